"""Runs the training loop over segments of steps, and decides when to log, evaluate and save."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.config.train import TrainConfig
from kvjax.devices import backend, device_count
from kvjax.errors import InputError
from kvjax.model.decoder import DecoderConfig, Params
from kvjax.sweeps.evaluation import SplitEvaluator
from kvjax.task.benchmark import Benchmark
from kvjax.task.encoding import encode_records
from kvjax.train.curriculum import draw_batches, draw_phases
from kvjax.train.memory import check_memory
from kvjax.train.schedule import adam_moments
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
    """Where one seed's training goes: rows as they come, and states worth saving."""

    def log(self, row: Row) -> None:
        """Takes a row of `metrics.jsonl`."""

    def save(self, step: int, params: Params, mu: Params, nu: Params, evaluations: dict[str, Row]) -> None:
        """Takes the state after `step`, as numpy trees, with the step's evaluations by split, if it had any."""

    def diverge(self, step: int, loss: float) -> None:
        """Takes the step at which loss or gradient stopped being finite; nothing comes after it."""


class Training:
    """Several seeds of one config on one benchmark, trained together. Every split it needs is read at once.

    Args:
      config: the config; its own seed is not used.
      benchmark: the benchmark to train on.
      seeds: the seeds.
      undecayed: paths of the parameters without weight decay, as in `make_optimizer`.

    Raises:
      InputError: the benchmark lacks a tracked split, its records are damaged or longer than the model, or the training
        does not fit into memory.
    """

    def __init__(
        self,
        config: TrainConfig,
        benchmark: Benchmark,
        seeds: Sequence[int],
        *,
        undecayed: frozenset[tuple[str, ...]] = frozenset(),
    ):
        missing = [split for split in config.evaluation.tracked_splits if split not in benchmark.split_sizes]
        if missing:
            raise InputError(f"{benchmark.path}: expected the tracked split {missing[0]}; found none")
        self.config = config
        self.seeds = tuple(seeds)
        self.decoder = DecoderConfig.from_model_config(config.model, len(benchmark.vocabulary.tokens))
        records, source = benchmark.read_split(TRAIN_SPLIT), benchmark.layout.split(TRAIN_SPLIT)
        self._phases = draw_phases(config.curriculum, records, source)
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
            config.optimization,
            num_steps=config.num_steps,
            batch_size=config.batch_size,
            length=encoded.tokens.shape[1],
            backend=backend(),
            num_seeds=len(self.seeds),
            num_devices=device_count(),
        )
        self.program: TrainProgram = dataclasses.replace(program, undecayed=undecayed)
        # Every segment has the same length, so that one program serves all but a last, odd one.
        self._segment = math.gcd(config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps)
        check_memory(
            self.program,
            num_seeds=len(self.seeds),
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
        """Draws each seed's state before its first step."""
        states = []
        for seed in self.seeds:
            params = initial_params(self.config.model, self.decoder, seed)
            states.append(TrainState(params, self.program.optimizer.init(params)))
        return states

    def run(
        self,
        states: Sequence[TrainState],
        recorders: Sequence[RunRecorder],
        *,
        done_steps: int = 0,
        advance: Callable[[int], None],
    ) -> None:
        """Trains from after `done_steps` to the last step.

        A seed whose loss or gradient is not finite has diverged. It ends there, and the others go on, with the same
        numbers as without it.

        Args:
          states: each seed's state after `done_steps`.
          recorders: each seed's recorder.
          done_steps: steps taken already.
          advance: called with the number of steps done.
        """
        config = self.config
        stacked, tokens = start_training(self.program, states, self._tokens)
        segment, going = self._segment, dict(enumerate(recorders))
        while done_steps < config.num_steps and going:
            steps = min(segment - done_steps % segment, config.num_steps - done_steps)
            indices = self._batches(done_steps + 1, steps)
            stacked, metrics = train_segment(
                self.program, stacked, tokens, indices, jnp.asarray(done_steps + 1, jnp.int32)
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
                draw_batches(seed, first_step, steps, self._phases, batch_size=self.config.batch_size)
                for seed in self.seeds
            ]
        )

    def _log(self, recorder: RunRecorder, metrics: StepMetrics, index: int, first_step: int, steps: int) -> None:
        for offset in range(steps):
            step = first_step + offset
            if step == 1 or step % self.config.log_every_steps == 0:
                values = {
                    name: float(getattr(metrics, name)[index, offset])
                    for name in ("loss", "token_accuracy", "grad_norm", "learning_rate")
                }
                recorder.log({"phase": "train", "step": step, **values})

    def _evaluate_and_save(self, stacked: TrainState, recorders: Mapping[int, RunRecorder], step: int) -> None:
        config = self.config
        evaluates = step % config.eval_every_steps == 0 or step == config.num_steps
        saves = step % config.checkpoint_every_steps == 0 or step == config.num_steps
        if not (evaluates or saves):
            return
        for index, recorder in recorders.items():
            state = jax.device_get(jax.tree.map(lambda leaf, i=index: leaf[i], stacked))
            evaluations = {}
            if evaluates:
                for split in config.evaluation.tracked_splits:
                    evaluation = self._evaluator.evaluate(state.params, split, max_records=self._max_records)
                    evaluations[split] = {"phase": "eval", "split": split, "step": step, **evaluation.to_row()}
                    recorder.log(evaluations[split])
            recorder.save(step, state.params, *adam_moments(state.optimizer), evaluations)


def _first_not_finite(metrics: StepMetrics, index: int) -> int | None:
    """Finds the first step of a segment at which a seed's loss or gradient is not finite."""
    lost = ~(np.isfinite(metrics.loss[index]) & np.isfinite(metrics.grad_norm[index]))
    return int(np.argmax(lost)) if lost.any() else None
