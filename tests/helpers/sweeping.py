"""Sweeps of the small runs, as the command makes them."""

from __future__ import annotations

from kvjax.artifacts.run_dir import RunDir
from kvjax.execution.inputs import RunInputs, prepare_run
from kvjax.pipeline.sweep import checkpoint_source as source
from kvjax.sweeps.results import SweepReport
from kvjax.sweeps.run import sweep_runs
from kvjax.sweeps.settings import SweepSettings

__all__ = ["prepared_run", "source", "sweep"]


def prepared_run(run, *, probe_set=None, steps="all", reference="final", opened=None) -> RunInputs:
    """Prepares a run directory, with its own benchmark."""
    return prepare_run(
        RunDir.open(run), benchmark_dir=None, probe_set=probe_set, steps=steps, reference=reference, opened=opened
    )


def sweep(run, *, steps="all", reference="final", **settings) -> SweepReport:
    """Sweeps a run directory and returns the report."""
    prepared = prepared_run(run, steps=steps, reference=reference)
    (report,) = sweep_runs([prepared], source, settings=SweepSettings(**settings), advance=lambda n: None)
    return report
