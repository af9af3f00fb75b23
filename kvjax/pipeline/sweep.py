"""The stage that measures every checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvjax.converters.cached_loader import CachedLoader
from kvjax.errors import InputError
from kvjax.execution.inputs import OpenedInputs, RunInputs, prepare_run
from kvjax.model.checkpoint import CheckpointSource
from kvjax.pipeline.progress import Progress, no_progress
from kvjax.pipeline.settings import DEFAULT_RESULTS, ResultSettings, RunsOnBenchmark, SweepInputs
from kvjax.pipeline.written_runs import open_to_write
from kvjax.sweeps.run import sweep_runs
from kvjax.sweeps.settings import SweepSettings

if TYPE_CHECKING:
    from kvjax.sweeps.results import SweepReport


def sweep(
    runs: RunsOnBenchmark,
    inputs: SweepInputs,
    settings: SweepSettings,
    progress: Progress = no_progress,
    results: ResultSettings = DEFAULT_RESULTS,
) -> list[SweepReport]:
    """Measures checkpoints of runs, writes their tables and returns what each has.

    Raises:
      InputError: a run, its benchmark, the probe set or a checkpoint cannot be used, or a run was measured before with
        other settings.
    """
    opened = OpenedInputs()
    with open_to_write(runs, results) as found:
        prepared = [
            prepare_run(
                run,
                benchmark_dir=runs.benchmark_dir,
                probe_set=inputs.probe_set,
                steps=inputs.steps,
                reference=inputs.reference,
                opened=opened,
            )
            for run in found
        ]
        with progress(sum(len(work.wanted) for work in prepared), "checkpoints") as advance:
            return sweep_runs(prepared, checkpoint_source, settings=settings, advance=advance)


def checkpoint_source(work: RunInputs) -> CheckpointSource:
    """Opens where a prepared run's checkpoints come from: its PyTorch files, through the parameter store."""
    return CachedLoader(work.run, work.benchmark, certify_on=work.certificate_tokens)


def check_usable(reports: list[SweepReport]) -> None:
    """Refuses a sweep of a run none of whose checkpoints could be used.

    Raises:
      InputError: there is such a run; the message gives the first reason.
    """
    for report in reports:
        if not report.rows:
            reason = next(iter(report.log.refused.values()))
            raise InputError(f"{report.run.path}: expected at least one usable checkpoint; found none ({reason})")
