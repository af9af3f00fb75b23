"""Runs the training loop over segments of steps, and decides when to log, evaluate and save."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kvjax.config.train import TrainConfig
from kvjax.devices import backend, device_count
from kvjax.errors import InputError
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params
from kvjax.sweeps.evaluation import SplitEvaluator
from kvjax.task.benchmark import Benchmark
from kvjax.task.encoding import encode_records
from kvjax.train.curriculum import draw_batches, draw_phases
from kvjax.train.memory import check_memory
from kvjax.train.schedule import Hyperparameters, accumulators_of, make_optimizer
from kvjax.train.trainer import (
    StepMetrics,
    TrainProgram,
    TrainState,
    initial_params,
    plan_training,
    start_training,
    train_segment,
)

TRAIN_SPLIT = "train"

Row = dict[str, Any]


class RunRecorder(Protocol):
    """Where one run's training goes: rows as they come, and states worth saving."""

    def log(self, row: Row) -> None:
        """Takes a row of `metrics.jsonl`."""

    def save(self, step: int, params: Params, accumulators: Mapping[str, Params], evaluations: dict[str, Row]) -> None:
        """Takes the state after `step`, as numpy trees, with the step's evaluations by split, if it had any."""

    def diverge(self, step: int, loss: float) -> None:
        """Takes the step at which loss or gradient stopped being finite; nothing comes after it."""


# What each run of a program has of its own: numbers and batches, which are arrays, and names.
_OF_EACH_RUN = ("run_name", "seed", "output_dir", "optimization", "curriculum", "device", "num_workers")


def shared_settings(config: TrainConfig) -> str:
    """Writes, as JSON, what runs of one program have in common: shapes, data, steps, optimiser, evaluations."""
    shared = config.model_dump(mode="json", exclude={**dict.fromkeys(_OF_EACH_RUN, True), "model": {"init_scale"}})
    shared["optimization"] = config.optimization.model_dump(include={"optimizer", "nesterov"})
    return json.dumps(shared)


class Training:
    """Several runs on one benchmark, trained as one program. Every split it needs is read at once.

    Args:
      configs: the runs; they share `shared_settings`.
      benchmark: the benchmark to train on.
      undecayed: paths of the parameters without weight decay, as in `make_optimizer`.

    Raises:
      InputError: the benchmark lacks a tracked split, its records are damaged or longer than the model, or the training
        does not fit into memory.
    """

    def __init__(
        self,
        configs: Sequence[TrainConfig],
        benchmark: Benchmark,
        *,
        undecayed: frozenset[tuple[str, ...]] = frozenset(),
    ):
        self.configs, config = tuple(configs), configs[0]
        if len({shared_settings(one) for one in configs}) > 1:
            expected = "runs that differ in seed, optimization, init_scale and curriculum alone, of one optimizer"
            raise ValueError(f"expected {expected}")
        missing = [split for split in config.evaluation.tracked_splits if split not in benchmark.split_sizes]
        if missing:
            raise InputError(f"{benchmark.path}: expected the tracked split {missing[0]}; found none")
        self.decoder = DecoderConfig.from_model_config(config.model, len(benchmark.vocabulary.tokens))
        records, source = benchmark.read_split(TRAIN_SPLIT), benchmark.layout.split(TRAIN_SPLIT)
        phases = {one.curriculum: draw_phases(one.curriculum, records, source) for one in configs}
        self._phases = [phases[one.curriculum] for one in configs]
        encoded = encode_records(
            records,
            benchmark.vocabulary,
            [TRAIN_SPLIT],
            max_seq_len=config.model.max_seq_len,
            source=source,
        )
        self._tokens = encoded.tokens
        program = plan_training(
            self.decoder,
            batch_size=config.batch_size,
            length=encoded.tokens.shape[1],
            backend=backend(),
            num_runs=len(configs),
            num_devices=device_count(),
        )
        self.program: TrainProgram = dataclasses.replace(program, undecayed=undecayed)
        # Every segment has the same length, so that one program serves all but a last, odd one.
        self._segment = math.gcd(config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps)
        check_memory(
            self.program,
            num_runs=len(configs),
            accumulators=max(len(one.optimization.accumulators) for one in configs),
            batch_size=config.batch_size,
            length=encoded.tokens.shape[1],
            segment=min(self._segment, config.num_steps),
            on_cpu=backend() == "cpu",
        )
        limit = config.evaluation.max_eval_batches
        self._max_records = limit and limit * config.evaluation.batch_size
        self._evaluator = SplitEvaluator(self.decoder, benchmark)
        for split in config.evaluation.tracked_splits:
            self._evaluator.prepare(split, max_records=self._max_records)

    def initial_states(self) -> list[TrainState]:
        """Draws each run's state before its first step."""
        states = []
        for config in self.configs:
            params = initial_params(config.model, self.decoder, config.seed)
            states.append(TrainState(params, self.optimizer(config).init(params)))
        return states

    def optimizer(self, config: TrainConfig) -> optax.GradientTransformation:
        """Builds the optimiser of a run."""
        return make_optimizer(Hyperparameters.of(config.optimization, config.num_steps), self.program.undecayed)

    def run(
        self,
        states: Sequence[TrainState],
        recorders: Sequence[RunRecorder],
        *,
        done_steps: int = 0,
        advance: Callable[[int], None],
    ) -> None:
        """Trains from after `done_steps` to the last step.

        A run whose loss or gradient is not finite has diverged. It ends there, and the others go on, with the same
        numbers as without it.

        Args:
          states: each run's state after `done_steps`.
          recorders: each run's recorder.
          done_steps: steps taken already.
          advance: called with the number of steps done.
        """
        config = self.configs[0]
        hypers = [Hyperparameters.of(one.optimization, one.num_steps) for one in self.configs]
        hypers, stacked, tokens = start_training(self.program, hypers, states, self._tokens)
        segment, going = self._segment, dict(enumerate(recorders))
        while done_steps < config.num_steps and going:
            steps = min(segment - done_steps % segment, config.num_steps - done_steps)
            indices = self._batches(done_steps + 1, steps)
            stacked, metrics = train_segment(
                self.program, hypers, stacked, tokens, indices, jnp.asarray(done_steps + 1, jnp.int32)
            )
            metrics = jax.device_get(metrics)
            for index, recorder in list(going.items()):
                lost = _first_not_finite(metrics, index)
                self._log(recorder, metrics, index, done_steps + 1, steps if lost is None else lost)
                if lost is not None:
                    recorder.diverge(done_steps + 1 + lost, float(metrics.loss[index, lost]))
                    del going[index]
            done_steps += steps
            self._evaluate_and_save(stacked, going, done_steps)
            advance(steps)
        advance(config.num_steps - done_steps)

    def _batches(self, first_step: int, steps: int) -> np.ndarray:
        return np.stack(
            [
                draw_batches(config.seed, first_step, steps, phases, batch_size=config.batch_size)
                for config, phases in zip(self.configs, self._phases, strict=True)
            ]
        )

    def _log(self, recorder: RunRecorder, metrics: StepMetrics, index: int, first_step: int, steps: int) -> None:
        for offset in range(steps):
            step = first_step + offset
            if step == 1 or step % self.configs[0].log_every_steps == 0:
                values = {
                    name: float(getattr(metrics, name)[index, offset])
                    for name in ("loss", "token_accuracy", "grad_norm", "learning_rate")
                }
                recorder.log({"phase": "train", "step": step, **values})

    def _evaluate_and_save(self, stacked: TrainState, recorders: dict[int, RunRecorder], step: int) -> None:
        """Hands the state after a step on where something is due; takes out runs that have diverged by it."""
        config = self.configs[0]
        evaluates = step % config.eval_every_steps == 0 or step == config.num_steps
        saves = step % config.checkpoint_every_steps == 0 or step == config.num_steps
        if not (evaluates or saves):
            return
        for index, recorder in list(recorders.items()):
            state = jax.device_get(jax.tree.map(lambda leaf, i=index: leaf[i], stacked))
            evaluations = {}
            if evaluates:
                for split in config.evaluation.tracked_splits:
                    evaluation = self._evaluator.evaluate(state.params, split, max_records=self._max_records)
                    evaluations[split] = {"phase": "eval", "split": split, "step": step, **evaluation.to_row()}
                losses = [row["loss"] for row in evaluations.values()]
                if not np.isfinite(losses).all():  # the step's own loss was that of the parameters before it
                    recorder.diverge(step, losses[int(np.argmin(np.isfinite(losses)))])
                    del recorders[index]
                    continue
                for row in evaluations.values():
                    recorder.log(row)
            recorder.save(step, state.params, accumulators_of(state.optimizer), evaluations)


def _first_not_finite(metrics: StepMetrics, index: int) -> int | None:
    """Finds the first step of a segment at which a run's loss or gradient is not finite."""
    lost = ~(np.isfinite(metrics.loss[index]) & np.isfinite(metrics.grad_norm[index]))
    return int(np.argmax(lost)) if lost.any() else None
