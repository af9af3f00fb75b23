"""A sweep that goes on while its runs train."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvjax.pipeline.progress import Progress, no_progress
from kvjax.pipeline.settings import DEFAULT_RESULTS, ResultSettings, RunsOnBenchmark, SweepInputs
from kvjax.pipeline.sweep import sweep
from kvjax.sweeps.settings import SweepSettings

if TYPE_CHECKING:
    from kvjax.sweeps.results import SweepReport

_SECONDS_BETWEEN = 30


def follow(
    runs: RunsOnBenchmark,
    inputs: SweepInputs,
    settings: SweepSettings,
    progress: Progress = no_progress,
    results: ResultSettings = DEFAULT_RESULTS,
) -> Iterator[list[SweepReport]]:
    """Sweeps runs again and again until all are complete, and yields what each round left.

    A checkpoint that is still being written cannot be used yet. It is measured once it stays as it is: the last round
    is one in which the unusable files are the same as in the round before.
    """
    settings, refused = dataclasses.replace(settings, skip_bad=True), set()
    results = dataclasses.replace(results, wait=True)  # another command may write between two rounds
    while True:
        reports = sweep(runs, inputs, settings, progress, results)
        yield reports
        before, refused = refused, {seen for report in reports for seen in _refused_files(report)}
        if refused == before and all(report.run.complete for report in reports):
            return
        settings = dataclasses.replace(settings, overwrite=False)  # once; later rounds measure what is new
        time.sleep(_SECONDS_BETWEEN)


def _refused_files(report: SweepReport) -> list[tuple]:
    """Lists the files that could not be used, each with size and time: one still being written is another later."""
    files = [report.run.layout.checkpoints / name for name in report.log.refused]
    return [(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
