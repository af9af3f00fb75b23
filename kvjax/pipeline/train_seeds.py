"""The command `train`: the seeds of a config, together in this process, or in groups on a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kvjax.artifacts.run_dir import RunDir
from kvjax.config.files import find_config, read_config
from kvjax.config.train import TrainConfig
from kvjax.errors import InputError, note, unusable
from kvjax.pipeline.progress import Progress, no_progress
from kvjax.pipeline.resume import check_same_training
from kvjax.pipeline.run_history import RunHistory
from kvjax.pipeline.settings import TrainSettings
from kvjax.pipeline.train import (
    TrainedRun,
    begin_runs,
    check_free,
    recorded_config,
    run_directories,
    same_run,
    train_missing_runs,
    train_runs,
)
from kvjax.pipeline.train_apart import TrainingGroup, train_apart
from kvjax.task.benchmark import Benchmark
from kvjax.units.unit import IN_PROCESS, Engine


def train(settings: TrainSettings, progress: Progress = no_progress, engine: Engine = IN_PROCESS) -> list[TrainedRun]:
    """Trains the seeds of a config: in this process as one program, on a cluster in as many groups as it has workers.

    Raises:
      InputError: the config or the benchmark cannot be used, a directory is taken, a run cannot be resumed, or all runs
        diverged.
    """
    config = read_config(find_config(settings.config, "train"), TrainConfig)
    if settings.benchmark_dir:
        config = config.model_copy(update={"benchmark_dir": settings.benchmark_dir})
    runs = run_directories(config, settings.seeds, settings.output_dir)
    benchmark = Benchmark.open(Path(config.benchmark_dir))
    if engine.spreads:
        trained = _train_on_workers(runs, benchmark, settings, progress, engine)
    else:
        ended = _diverged(runs) if settings.resume else {}
        going = {path: config for path, config in runs.items() if path not in ended}
        with progress(config.num_steps, "steps") as advance:
            flags = {"resume": settings.resume, "overwrite": settings.overwrite}
            now = train_runs(going, benchmark, **flags, advance=advance) if going else []
        by_path = {run.path: run for run in now}
        trained = [by_path.get(path) or _trained(path, config) for path, config in runs.items()]
    if all(run.diverged_at is not None for run in trained):
        found = ", ".join(f"seed {run.seed} diverged at step {run.diverged_at}" for run in trained)
        raise InputError(f"{settings.config}: expected a finite loss and gradient; found none to the end ({found})")
    return trained


def _diverged(runs: Mapping[Path, TrainConfig]) -> dict[Path, TrainConfig]:
    """Finds the runs that diverged: they would again, and the others would go on from a step that these have.

    Raises:
      InputError: one was trained with other settings.
    """
    diverged = {}
    for path, config in runs.items():
        if path.is_dir() and (step := RunDir.open(path).diverged_at) is not None:
            check_same_training(path, config)
            note(f"{path}: not resumed, for it diverged at step {step}")
            diverged[path] = config
    return diverged


def _train_on_workers(
    runs: Mapping[Path, TrainConfig], benchmark: Benchmark, settings: TrainSettings, progress: Progress, engine: Engine
) -> list[TrainedRun]:
    """Trains runs in groups. A group that loses its worker goes on elsewhere, also one that began anew."""
    groups = [TrainingGroup(runs, benchmark.path)]
    if settings.resume:
        if all(recorded_config(path) is None for path in runs):
            raise unusable(", ".join(map(str, runs)), "a run to resume", "none")
        train_apart(groups, engine, progress, _resume)
    else:
        for path in runs:
            check_free(path, settings.overwrite)
        if settings.overwrite:
            train_apart(groups, engine, no_progress, _begin)
        train_apart(groups, engine, progress)
    return [_trained(path, config) for path, config in runs.items()]


def _begin(group: TrainingGroup) -> None:
    begin_runs(group.runs, Benchmark.open(group.benchmark_dir))


def _resume(group: TrainingGroup) -> None:
    """Goes on with the begun runs of a group, whose end may be another now, and begins the others."""
    benchmark, changed, others = Benchmark.open(group.benchmark_dir), {}, {}
    for path, config in group.runs.items():
        recorded = recorded_config(path)
        (others if recorded is None or same_run(recorded, config) else changed)[path] = config
    for path in _diverged(changed):
        del changed[path]
    if changed:
        train_runs(changed, benchmark, resume=True, overwrite=False, advance=lambda steps: None)
    train_missing_runs(others, benchmark, advance=lambda steps: None)


def _trained(path: Path, config: TrainConfig) -> TrainedRun:
    """Reads what a finished training left."""
    run = RunDir.open(path)
    evaluations = RunHistory.of(run.log, config.num_steps, config.checkpointing).evaluations
    return TrainedRun(path, config.seed, evaluations, run.diverged_at)
