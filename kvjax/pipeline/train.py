"""The stage that trains seeds: which run directories there are, how they start, and how they go on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from kvjax.artifacts.files import read_json, replace_directory, write_json
from kvjax.artifacts.layout import RunLayout
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.run_lock import hold
from kvjax.config.files import find_config, read_config
from kvjax.config.train import TrainConfig
from kvjax.converters.convert import check_recorded_config
from kvjax.converters.optimizer_state import from_torch_optimizer
from kvjax.converters.to_flax import to_flax
from kvjax.converters.torch_checkpoint import read_checkpoint
from kvjax.errors import InputError, unusable
from kvjax.pipeline.current import Current
from kvjax.pipeline.progress import Progress, no_progress
from kvjax.pipeline.run_recorder import FileRecorder
from kvjax.pipeline.settings import TrainSettings
from kvjax.task.benchmark import Benchmark
from kvjax.train.loop import Row, Training
from kvjax.train.schedule import restore_adam
from kvjax.train.trainer import TrainState

_PLACES = {"output_dir", "benchmark_dir"}  # a folder that was moved holds the same run


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A trained seed: its directory and its last evaluations by split."""

    path: Path
    seed: int
    evaluations: Mapping[str, Row]


def train(settings: TrainSettings, progress: Progress = no_progress) -> list[TrainedRun]:
    """Trains the seeds of a config, as one program.

    Raises:
      InputError: the config or the benchmark cannot be used, a directory is taken, or a run cannot be resumed.
    """
    config = read_config(find_config(settings.config, "train"), TrainConfig)
    if settings.benchmark_dir:
        config = config.model_copy(update={"benchmark_dir": settings.benchmark_dir})
    runs = run_directories(config, settings.seeds, settings.output_dir)
    benchmark = Benchmark.open(Path(config.benchmark_dir))
    with progress(config.num_steps, "steps") as advance:
        return train_runs(runs, benchmark, resume=settings.resume, overwrite=settings.overwrite, advance=advance)


def run_directories(
    config: TrainConfig, seeds: Sequence[int] | None, output_dir: str | None
) -> dict[Path, TrainConfig]:
    """Maps each run directory to its config.

    Without seeds, it is the config's own run in its output directory. With seeds, each has a folder `seed_<n>`.
    """
    base = Path(output_dir or config.output_dir)
    if seeds is None:
        return {base: config.model_copy(update={"output_dir": str(base)})}
    return {
        base / f"seed_{seed}": config.model_copy(
            update={
                "seed": seed,
                "run_name": f"{config.run_name}_seed_{seed}",
                "output_dir": str(base / f"seed_{seed}"),
            }
        )
        for seed in seeds
    }


def train_runs(
    runs: Mapping[Path, TrainConfig],
    benchmark: Benchmark,
    *,
    resume: bool,
    overwrite: bool,
    advance: Callable[[int], None],
) -> list[TrainedRun]:
    """Trains runs that differ in their seed alone, as one program, one run directory each.

    Args:
      runs: run directory -> config.
      benchmark: what they are trained on.
      resume: continue from the latest step that all runs have a checkpoint of.
      overwrite: replace existing run directories.
      advance: called with the number of steps done.

    Raises:
      InputError: a directory is taken, cannot be resumed, or is written by another command.
    """
    with contextlib.ExitStack() as held:
        for path in sorted(runs, key=Path.resolve):
            held.enter_context(hold(RunLayout(path).training_lock, path))
        return _train_runs(runs, benchmark, resume=resume, overwrite=overwrite, advance=advance)


def _train_runs(
    runs: Mapping[Path, TrainConfig],
    benchmark: Benchmark,
    *,
    resume: bool,
    overwrite: bool,
    advance: Callable[[int], None],
) -> list[TrainedRun]:
    config = next(iter(runs.values()))
    training = Training(config, benchmark, [run.seed for run in runs.values()])
    if resume:
        for path, run in runs.items():
            _check_same_training(path, run)
        step, states = _resumed_states(runs, training, benchmark)
        advance(step)
    else:
        with contextlib.ExitStack() as held:
            for path in sorted(runs, key=Path.resolve):
                held.enter_context(_results_held(path))
                _check_free(path, overwrite)
            step, states = 0, training.initial_states()
            for path, run in runs.items():
                with replace_directory(path) as fresh:
                    (begun := RunLayout(fresh)).checkpoints.mkdir()
                    write_json(begun.config, run.model_dump(mode="json"))
    metadata = read_json(benchmark.layout.metadata)
    num_parameters = sum(np.size(leaf) for leaf in jax.tree.leaves(states[0].params))
    recorders = [FileRecorder(path, run, num_parameters, metadata, step) for path, run in runs.items()]
    training.run(states, recorders, done_steps=step, advance=advance)
    for recorder in recorders:
        recorder.finish()
    return [TrainedRun(r.path, r.config.seed, r.last_evaluations) for r in recorders]


def train_missing_runs(
    runs: Mapping[Path, TrainConfig], benchmark: Benchmark, *, advance: Callable[[int], None]
) -> None:
    """Trains what is not trained yet: finished runs stay as they are, begun ones go on, the others start.

    Args:
      runs: run directory -> config.
      benchmark: what they are trained on.
      advance: called with the number of steps done, of all runs together.

    Raises:
      InputError: a run directory holds a run of another config.
    """
    begun, fresh = {}, {}
    for path, config in runs.items():
        layout = RunLayout(path)
        if layout.config.is_file():
            recorded = read_config(layout.config, TrainConfig, recorded=True)
            if not _same_run(recorded, config):
                found = f"a run of another config ({_differences(recorded, config)})"
                raise unusable(path, "a run of this config (or another `output_dir`)", found)
        if layout.summary.is_file():
            advance(config.num_steps)
        elif layout.config.is_file() and _resumable(path):
            begun[path] = config
        else:
            fresh[path] = config
    for group, resume in ((begun, True), (fresh, False)):
        if group:
            train_runs(group, benchmark, resume=resume, overwrite=True, advance=_times(len(group), advance))


def runs_are_trained(runs: Mapping[Path, TrainConfig]) -> Current:
    """Says whether every run directory holds a finished run of its config."""
    for path, config in runs.items():
        try:
            recorded = read_config(RunLayout(path).config, TrainConfig, recorded=True)
        except InputError as error:
            return Current(False, str(error))
        if not _same_run(recorded, config):
            return Current(False, f"{path} holds a run of another config ({_differences(recorded, config)})")
        if not RunLayout(path).summary.is_file():
            reached = max(RunDir.open(path).checkpoints, default=0)
            return Current(False, f"training in {path} has reached {reached} of {config.num_steps} steps")
    return Current(True, f"all {len(runs)} runs are trained")


def _same_run(recorded: TrainConfig, config: TrainConfig) -> bool:
    return recorded.model_dump(exclude=_PLACES) == config.model_dump(exclude=_PLACES)


def _differences(recorded: TrainConfig, config: TrainConfig) -> str:
    """Names the fields in which two configs differ, with both values of plain ones."""
    ours, theirs = config.model_dump(exclude=_PLACES), recorded.model_dump(exclude=_PLACES)
    plain = {name for name in ours if not isinstance(ours[name], dict)}
    words = [
        f"{name} {theirs[name]} there, {ours[name]} here" if name in plain else name
        for name in ours
        if ours[name] != theirs[name]
    ]
    return "; ".join(words)


def _times(runs: int, advance: Callable[[int], None]) -> Callable[[int], None]:
    return lambda steps: advance(runs * steps)


def _results_held(path: Path) -> contextlib.AbstractContextManager[None]:
    """Keeps commands from writing results into a directory while it is replaced."""
    layout = RunLayout(path)
    return hold(layout.analysis_lock, path) if layout.analysis.is_dir() else contextlib.nullcontext()


def _check_free(path: Path, overwrite: bool) -> None:
    """Refuses a directory that a run may not be put into; all are checked before the first is replaced."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if not overwrite:
            raise unusable(path, "an empty run directory (or `resume`, or `overwrite`)", "files")
        config = RunLayout(path).config
        if not config.is_file():
            raise unusable(path, "an earlier run to overwrite", f"a path without {config.name}")


def _check_same_training(path: Path, config: TrainConfig) -> None:
    """Refuses a config that would give other steps than the recorded run; how long the run is may change."""
    file = RunLayout(path).config
    recorded = read_config(file, TrainConfig, recorded=True)
    names = ["seed", "batch_size", "model", "optimization"]
    schedule = config.optimization.schedule
    if schedule.kind == "cosine_decay" and schedule.decay_end_step is None:
        names.append("num_steps")  # the decay ends there: another end is another schedule from the start
    for name in names:
        if getattr(recorded, name) != getattr(config, name):
            ours, theirs = getattr(config, name), getattr(recorded, name)
            raise unusable(file, f"the same {name} as the config to resume with, {ours}", theirs)


def _resumable(path: Path) -> dict[int, Path]:
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


def _resumed_states(
    runs: Mapping[Path, TrainConfig], training: Training, benchmark: Benchmark
) -> tuple[int, list[TrainState]]:
    available = {path: _resumable(path) for path in runs}
    common = set.intersection(*(set(files) for files in available.values()))
    if not common:
        where = ", ".join(map(str, runs))
        raise unusable(where, "a checkpoint to resume from, of one step in all runs", "none")
    step = max(common)
    return step, [_read_state(available[path][step], step, run, training, benchmark) for path, run in runs.items()]


def _read_state(path: Path, step: int, config: TrainConfig, training: Training, benchmark: Benchmark) -> TrainState:
    checkpoint = read_checkpoint(path)
    if checkpoint.step != step:
        raise unusable(path, f"the checkpoint of step {step}", f"step {checkpoint.step}")
    if check_recorded_config(checkpoint, config, benchmark, path):
        raise unusable(path, f"a checkpoint trained on the benchmark in {benchmark.path}", "one trained on another")
    model, vocab_size = training.config.model, training.decoder.vocab_size
    params = to_flax(checkpoint.state, model, vocab_size, where=path)
    if "unembedding" in params:
        raise unusable(path, "a tied unembedding, as this trainer trains", "one of its own")
    if not checkpoint.optimizer_state:
        raise unusable(path, "optimizer state to resume from", "none")
    moments = from_torch_optimizer(checkpoint.optimizer_state, params, model, vocab_size, where=path)
    if moments.count != checkpoint.step:
        raise unusable(path, f"optimizer state of step {checkpoint.step}", f"of step {moments.count}")
    mu, nu = moments.mu, moments.nu
    return TrainState(params, restore_adam(training.program.optimizer, params, count=moments.count, mu=mu, nu=nu))
