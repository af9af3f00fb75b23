"""A sweep that goes on while its runs train, and waits for those that have not begun."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kvjax.artifacts.find_runs import named_paths
from kvjax.artifacts.layout import RunLayout
from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import InputError, note
from kvjax.pipeline.progress import Progress, no_progress
from kvjax.pipeline.settings import DEFAULT_RESULTS, ResultSettings, RunsOnBenchmark, SweepInputs
from kvjax.pipeline.sweep import sweep_over_runs
from kvjax.sweeps.settings import SweepSettings
from kvjax.units.unit import IN_PROCESS, Engine

if TYPE_CHECKING:
    from kvjax.sweeps.results import SweepReport
    from kvjax.units.leader import Leader

_SECONDS_BETWEEN = 30


def follow(
    runs: RunsOnBenchmark,
    inputs: SweepInputs,
    settings: SweepSettings,
    progress: Progress = no_progress,
    results: ResultSettings = DEFAULT_RESULTS,
    engine: Engine = IN_PROCESS,
    *,
    group: Leader | None = None,
) -> Iterator[list[SweepReport]]:
    """Sweeps runs again and again until all are complete, and yields what each round left.

    A run without a checkpoint is waited for, even if its directory does not exist yet; a note says so.

    A checkpoint that is still being written cannot be used yet. It is measured once it stays as it is: the last round
    is one in which the unusable files are the same as in the round before.
    """
    settings, refused = dataclasses.replace(settings, skip_bad=True), set()
    results = dataclasses.replace(results, wait=True)  # another command may write between two rounds
    while True:
        begun, waited_for = _begun(runs.run_dirs)
        for name in waited_for:
            note(f"{name}: waiting for its first checkpoint")
        if begun:
            begun_runs = dataclasses.replace(runs, run_dirs=begun)
            # Each round would have another last checkpoint, to which all were compared anew.
            given = (begun_runs, inputs, settings, progress, results, engine)
            reports = sweep_over_runs(*given, group=group, still_training=True)
            yield reports
            before, refused = refused, {seen for report in reports for seen in _refused_files(report)}
            if not waited_for and refused == before and all(report.run.complete for report in reports):
                return
            settings = dataclasses.replace(settings, overwrite=False)  # once; later rounds measure what is new
        time.sleep(_SECONDS_BETWEEN)


def _begun(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Divides runs into those with a checkpoint and those without.

    Raises:
      InputError: a run cannot be opened.
    """
    begun, waited_for = [], []
    for name in names:
        try:
            paths = list(named_paths([name]))
        except InputError:  # a glob that finds no run yet
            waited_for.append(name)
            continue
        for path in paths:
            (begun if _has_begun(path) else waited_for).append(str(path))
    return begun, waited_for


def _has_begun(path: Path) -> bool:
    exists = path.exists() and not (path.is_dir() and not _is_run(path))
    return exists and bool(RunDir.open(path).checkpoints)


def _is_run(path: Path) -> bool:
    return RunLayout(path).config.is_file() or RunLayout(path).source_run.is_file()


def _refused_files(report: SweepReport) -> list[tuple]:
    """Lists the files that could not be used, each with size and time: one still being written is another later."""
    files = [report.run.layout.checkpoints / name for name in report.log.refused]
    return [(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
