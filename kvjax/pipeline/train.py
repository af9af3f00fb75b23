"""The stage that trains runs: which run directories there are, how they start, and how they go on."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from kvjax.artifacts.files import read_json
from kvjax.artifacts.layout import RunLayout
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.run_lock import hold
from kvjax.config.files import read_config
from kvjax.config.train import TrainConfig
from kvjax.errors import InputError, unusable
from kvjax.pipeline.background_writer import BackgroundWriter
from kvjax.pipeline.current import Current
from kvjax.pipeline.resume import ResumedRun, read_resumed, resumable
from kvjax.pipeline.run_recorder import FileRecorder, OptimizerStart
from kvjax.task.benchmark import Benchmark
from kvjax.train.loop import Row, Training
from kvjax.train.memory import checkpoint_file_bytes, parameter_count
from kvjax.train.schedule import restore_optimizer
from kvjax.train.trainer import TrainState

_PLACES = {"output_dir", "benchmark_dir"}  # a folder that was moved holds the same run


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A trained run: its directory, its last evaluations by split, and the step at which it diverged, if it did."""

    path: Path
    seed: int
    evaluations: Mapping[str, Row]
    diverged_at: int | None = None


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
    """Trains runs as one program, one run directory each.

    Args:
      runs: run directory -> config; the configs have one `shared_settings`.
      benchmark: what they are trained on.
      resume: continue from the latest step that all runs have a checkpoint of.
      overwrite: replace what training wrote in existing run directories.
      advance: called with the number of steps done.

    Raises:
      InputError: a directory is taken, cannot be resumed, or is written by another command.
    """
    with _training_held(runs):
        return _train_runs(runs, benchmark, resume=resume, overwrite=overwrite, advance=advance)


def begin_runs(runs: Mapping[Path, TrainConfig], benchmark: Benchmark) -> None:
    """Leaves run directories as before the first step, whatever runs they hold; checks first that they can be trained.

    Args:
      runs: run directory -> config; the configs have one `shared_settings`.
      benchmark: what they are trained on.

    Raises:
      InputError: a directory is taken, or is written by another command, or the runs cannot be trained.
    """
    with _training_held(runs):
        _train_runs(runs, benchmark, resume=False, overwrite=True, advance=lambda steps: None, begin_only=True)


def _train_runs(
    runs: Mapping[Path, TrainConfig],
    benchmark: Benchmark,
    *,
    resume: bool,
    overwrite: bool,
    advance: Callable[[int], None],
    begin_only: bool = False,
) -> list[TrainedRun]:
    configs = tuple(runs.values())
    # Everything is read and checked before the first file is touched.
    metadata = read_json(benchmark.layout.metadata)
    if resume:
        resumed = read_resumed(runs, benchmark)
        training = Training(configs, benchmark, undecayed=resumed.undecayed)
        step, states = (
            resumed.step,
            [_state(training, config, run) for config, run in zip(configs, resumed.runs, strict=True)],
        )
        starts = [OptimizerStart(run.optimizer.groups, run.optimizer.count - step) for run in resumed.runs]
    else:
        for path in runs:
            check_free(path, overwrite)
        training = Training(configs, benchmark)
        step, states, starts = 0, training.initial_states(), [OptimizerStart()] * len(runs)
    accumulators = max(len(config.optimization.accumulators) for config in configs)
    files = (1 + configs[0].checkpointing.save_best_checkpoint) * len(runs)
    for path in runs:
        _check_space(path, checkpoint_file_bytes(training.decoder, accumulators) * files)
    num_parameters = parameter_count(training.decoder)
    with BackgroundWriter(pending=len(runs)) as writer:  # at most one state of each run waits to be written
        recorders = [
            FileRecorder(path, run, num_parameters, metadata, writer, start)
            for (path, run), start in zip(runs.items(), starts, strict=True)
        ]
        if resume:
            for recorder, run in zip(recorders, resumed.runs, strict=True):
                recorder.go_on(run.history)
            advance(step)
        else:
            with contextlib.ExitStack() as held:
                for path in sorted(runs, key=Path.resolve):
                    held.enter_context(_results_held(path))
                for recorder in recorders:
                    recorder.begin()
        if not begin_only:
            training.run(states, recorders, done_steps=step, advance=advance)
            for recorder in recorders:
                if recorder.diverged_at is None:
                    recorder.finish()
    return [TrainedRun(r.path, r.config.seed, r.last_evaluations, r.diverged_at) for r in recorders]


def train_missing_runs(
    runs: Mapping[Path, TrainConfig], benchmark: Benchmark, *, advance: Callable[[int], None]
) -> None:
    """Trains what is not trained yet: finished runs stay as they are, begun ones go on, the others start.

    Args:
      runs: run directory -> config; the configs have one `shared_settings`.
      benchmark: what they are trained on.
      advance: called with the number of steps done, of all runs together.

    Raises:
      InputError: a run directory holds a run of another config.
    """
    begun, fresh = {}, {}
    for path, config in runs.items():
        layout = RunLayout(path)
        if (recorded := recorded_config(path)) is not None and not _holds(path, recorded, config):
            found = f"a run of another config ({_differences(recorded, config)})"
            raise unusable(path, "a run of this config (or another `output_dir`)", found)
        if layout.summary.is_file():
            advance(config.num_steps)
        elif recorded is not None and resumable(path):
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
        if not _holds(path, recorded, config):
            return Current(False, f"{path} holds a run of another config ({_differences(recorded, config)})")
        if not RunLayout(path).summary.is_file():
            reached = max(RunDir.open(path).checkpoints, default=0)
            return Current(False, f"training in {path} has reached {reached} of {config.num_steps} steps")
    return Current(True, f"all {len(runs)} runs are trained")


def recorded_config(path: Path) -> TrainConfig | None:
    """Reads the config that a run directory records; None if no run has begun there.

    Raises:
      InputError: the record is damaged.
    """
    file = RunLayout(path).config
    return read_config(file, TrainConfig, recorded=True) if file.is_file() else None


def same_run(recorded: TrainConfig, config: TrainConfig) -> bool:
    """Says whether two configs are of the same run, wherever run and benchmark lie."""
    return recorded.model_dump(exclude=_PLACES) == config.model_dump(exclude=_PLACES)


def _holds(path: Path, recorded: TrainConfig, config: TrainConfig) -> bool:
    """Says whether a directory holds the run of a config. One that diverged stays as it is if others go on longer."""
    ended = RunDir.open(path).diverged_at is not None
    return same_run(recorded.model_copy(update={"num_steps": config.num_steps}) if ended else recorded, config)


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


@contextlib.contextmanager
def _training_held(runs: Iterable[Path]) -> Iterator[None]:
    """Keeps other trainings out of run directories."""
    with contextlib.ExitStack() as held:
        for path in sorted(runs, key=Path.resolve):
            held.enter_context(hold(RunLayout(path).training_lock, path))
        yield


def _results_held(path: Path) -> contextlib.AbstractContextManager[None]:
    """Keeps commands from writing results into a directory while it is replaced."""
    layout = RunLayout(path)
    return hold(layout.analysis_lock, path) if layout.analysis.is_dir() else contextlib.nullcontext()


def check_free(path: Path, overwrite: bool) -> None:
    """Refuses a directory that a run may not be put into; all are checked before the first is replaced.

    Raises:
      InputError: there are files in it, which are to stay or are of no run.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if not overwrite:
            raise unusable(path, "an empty run directory (or `resume`, or `overwrite`)", "files")
        config = RunLayout(path).config
        if not config.is_file():
            raise unusable(path, "an earlier run to overwrite", f"a path without {config.name}")


def _check_space(path: Path, needed: int) -> None:
    """Refuses a disk without room for a checkpoint of each run, and the best; training would end at the first."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        raise unusable(path, f"{needed / 1e6:,.1f} MB of free disk for checkpoints", f"{free / 1e6:,.1f} MB")


def _state(training: Training, config: TrainConfig, run: ResumedRun) -> TrainState:
    state, step = run.optimizer, run.history.step
    optimizer, kept = training.optimizer(config), state.accumulators
    return TrainState(
        run.params, restore_optimizer(optimizer, run.params, count=state.count, accumulators=kept, step=step)
    )
