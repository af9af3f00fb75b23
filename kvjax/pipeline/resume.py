"""What training goes on from: the latest checkpoint of all runs, with everything checked that a resume needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from kvjax.artifacts.layout import RunLayout
from kvjax.artifacts.run_dir import RunDir
from kvjax.config.files import read_config
from kvjax.config.train import TrainConfig
from kvjax.converters.convert import check_recorded_config
from kvjax.converters.optimizer_state import OptimizerState, from_torch_optimizer, undecayed_paths
from kvjax.converters.to_flax import to_flax
from kvjax.converters.torch_checkpoint import read_checkpoint
from kvjax.converters.weights import AVERAGED
from kvjax.errors import note, unusable
from kvjax.model.params import Params
from kvjax.pipeline.run_history import RunHistory
from kvjax.task.benchmark import Benchmark
from kvjax.train.schedule import Hyperparameters, learning_rate


@dataclasses.dataclass(frozen=True)
class ResumedRun:
    """One run at the step that training goes on from.

    Attributes:
      params: its parameters.
      optimizer: its optimiser's state.
      history: what it logged up to the step.
    """

    params: Params
    optimizer: OptimizerState
    history: RunHistory


@dataclasses.dataclass(frozen=True)
class Resumed:
    """All runs that train together, at one step.

    Attributes:
      step: the step.
      runs: each run, in order.
      undecayed: paths of the parameters without weight decay, the same in all runs.
    """

    step: int
    runs: tuple[ResumedRun, ...]
    undecayed: frozenset[tuple[str, ...]]


def read_resumed(configs: Mapping[Path, TrainConfig], benchmark: Benchmark) -> Resumed:
    """Reads what training goes on from, and changes nothing.

    Args:
      configs: run directory -> config to go on with.
      benchmark: what they are trained on.

    Raises:
      InputError: a run was trained with other settings, has no checkpoint that all have, is planned to end before it,
        or its checkpoint or log cannot be used.
    """
    for path, config in configs.items():
        check_same_training(path, config)
    available = {path: resumable(path) for path in configs}
    common = set.intersection(*(set(files) for files in available.values()))
    if not common:
        raise unusable(", ".join(map(str, configs)), "a checkpoint to resume from, of one step in all runs", "none")
    step = max(common)
    for path, config in configs.items():
        if step > config.num_steps:
            raise unusable(path, f"num_steps of at least {step}, which the run has reached", config.num_steps)
    runs = {path: _read_run(path, available[path][step], step, config, benchmark) for path, config in configs.items()}
    undecayed = {
        undecayed_paths(run.optimizer.groups, configs[path].model.n_layers, where=available[path][step])
        for path, run in runs.items()
    }
    if len(undecayed) > 1:
        found = f"{len(undecayed)} different choices (resume the runs one by one)"
        raise unusable(", ".join(map(str, configs)), "weight decay on the same parameters in all runs", found)
    return Resumed(step, tuple(runs.values()), undecayed.pop())


def resumable(path: Path) -> dict[int, Path]:
    """Maps each step that training can go on from to its checkpoint file.

    These are the step checkpoints if the run keeps them, otherwise the last one, otherwise the best.
    """
    run = RunDir.open(path)
    if run.checkpoints:
        return dict(run.checkpoints)
    for file in (run.layout.last, run.layout.best):
        if file.is_file():
            return {read_checkpoint(file).step: file}
    return {}


def check_same_training(path: Path, config: TrainConfig) -> None:
    """Refuses a config that would give other steps than the recorded run; how long the run is may change.

    Raises:
      InputError: it would.
    """
    file = RunLayout(path).config
    recorded = read_config(file, TrainConfig, recorded=True)
    names = ["seed", "batch_size", "model", "optimization", "curriculum"]
    schedule = config.optimization.schedule
    if schedule.kind == "cosine_decay" and schedule.decay_end_step is None:
        names.append("num_steps")  # the decay ends there: another end is another schedule from the start
    for name in names:
        if getattr(recorded, name) != getattr(config, name):
            ours, theirs = getattr(config, name), getattr(recorded, name)
            raise unusable(file, f"the same {name} as the config to resume with, {ours}", theirs)


def _read_run(folder: Path, file: Path, step: int, config: TrainConfig, benchmark: Benchmark) -> ResumedRun:
    checkpoint = read_checkpoint(file, step)
    if AVERAGED in checkpoint.notes:
        raise unusable(file, "the trained weights, to go on from", "their average alone")
    for sentence in checkpoint.notes:
        note(f"{file}: {sentence}")
    if check_recorded_config(checkpoint, config, benchmark, file):
        raise unusable(file, f"a checkpoint trained on the benchmark in {benchmark.path}", "one trained on another")
    model, vocab_size = config.model, len(benchmark.vocabulary.tokens)
    params = to_flax(checkpoint.state, model, vocab_size, where=file)
    if "unembedding" in params:
        raise unusable(file, "a tied unembedding, as this trainer trains", "one of its own")
    if not checkpoint.optimizer_state:
        raise unusable(file, "optimizer state to resume from", "none")
    hyper = Hyperparameters.of(config.optimization, config.num_steps)
    optimizer = from_torch_optimizer(
        checkpoint.optimizer_state,
        params,
        model,
        vocab_size,
        names=checkpoint.state,
        optimization=config.optimization,
        learning_rates=[float(learning_rate(hyper, at)) for at in (step - 1, step + 1, step)],
        step=step,
        where=file,
    )
    if optimizer.count != step:
        note(f"{file}: its optimizer has taken {optimizer.count} steps, not {step}; bias correction goes on from there")
    history = RunHistory.of(RunDir.open(folder).log, step, config.checkpointing)
    return ResumedRun(params, optimizer, history)
