"""Runs opened for a command that writes results: each is locked until the command is done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from kvjax.artifacts.find_runs import Needs, find_run_dirs, with_results_in
from kvjax.artifacts.partials import remove_abandoned
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.run_lock import allow_locks, hold
from kvjax.pipeline.settings import ResultSettings, Runs


@contextlib.contextmanager
def open_to_write(runs: Runs, results: ResultSettings, *, needs: Needs = "step checkpoints") -> Iterator[list[RunDir]]:
    """Opens runs and keeps other commands from writing their results until the block ends.

    Args:
      runs: the runs.
      results: where their results go.
      needs: what directories that a glob finds have to hold, see `find_run_dirs`.

    Raises:
      InputError: a run cannot be opened, its results cannot be written, or another command writes them.
    """
    found = find_run_dirs(runs.run_dirs, needs=needs)
    if results.output_dir is not None:
        found = with_results_in(found, Path(results.output_dir))
    allow_locks(len(found))
    with contextlib.ExitStack() as held:
        # In one order for all commands: two that wait for each other would wait for ever.
        for run in sorted(found, key=lambda run: run.analysis.resolve()):
            held.enter_context(hold(run.layout.analysis_lock, run.path, wait=results.wait))
            _remove_abandoned(run)
        yield found


def _remove_abandoned(run: RunDir) -> None:
    """Removes what a killed command left half-written, also where this one writes nothing."""
    analysis, interventions = run.layout.analysis, run.layout.interventions
    for folder in (analysis, *(path for above in (analysis, interventions) for path in above.glob("*/"))):
        remove_abandoned(folder)
