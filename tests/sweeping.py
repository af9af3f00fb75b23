"""Sweeps of the small runs, as the command makes them."""

from __future__ import annotations

from kvjax.api import checkpoint_source as source
from kvjax.artifacts.run_dir import RunDir
from kvjax.sweeps.analysis import sweep_runs
from kvjax.sweeps.prepared import prepare_run
from kvjax.sweeps.publish import SweepReport
from kvjax.sweeps.stream import SweepSettings

__all__ = ["source", "sweep"]


def sweep(run, *, steps="all", reference="final", **settings) -> SweepReport:
    """Sweeps a run directory and returns the report."""
    prepared = prepare_run(RunDir.open(run), benchmark_dir=None, probe_set=None, steps=steps, reference=reference)
    (report,) = sweep_runs([prepared], source, settings=SweepSettings(**settings), advance=lambda n: None)
    return report
