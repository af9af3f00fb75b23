"""Does a stage for several runs: together in this process, or on a cluster, apart or as one unit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvjax.artifacts.find_runs import Needs, find_run_dirs, with_results_in
from kvjax.pipeline.progress import Progress
from kvjax.pipeline.settings import ResultSettings, Runs
from kvjax.units.unit import Engine, Unit


def over_runs(
    name: str,
    stage: Callable[..., list[Any]],
    runs: Runs,
    *settings: Any,
    progress: Progress,
    engine: Engine,
    results: ResultSettings | None = None,
    needs: Needs = "step checkpoints",
    **options: Any,
) -> list[Any]:
    """Does a stage for runs and returns its reports, in the order of the runs.

    In this process the stage gets all runs at once, and shares among them what it compiles. On a cluster each run is a
    unit of work.

    Args:
      name: of the stage, for messages.
      stage: called as `stage(runs, *settings, results=…, **options)`, in this process also with `progress`; returns a
        list.
      runs: the runs.
      settings: of the stage.
      progress: shows how far it is.
      engine: where it is done.
      results: where results go; None for a stage that writes none.
      needs: what directories that a glob finds have to hold, see `find_run_dirs`.
      options: further arguments of the stage.

    Raises:
      InputError: a run cannot be opened, or the stage refused one. What was written for others stays.
    """
    if not engine.spreads:
        given = {} if results is None else {"results": results}
        return stage(runs, *settings, progress=progress, **given, **options)
    found = find_run_dirs(runs.run_dirs, needs=needs)
    if results is not None:
        if results.output_dir is not None:
            found = with_results_in(found, Path(results.output_dir))
        options["results"] = dataclasses.replace(results, output_dir=None)
    units = [
        Unit(name, str(run.path), stage, (dataclasses.replace(runs, run_dirs=(str(run.path),)), *settings), options)
        for run in found
    ]
    with progress(len(units), "runs") as advance:
        return [report for reports in engine.run(units, advance) for report in reports]


def on_all_runs(
    name: str,
    stage: Callable[..., Any],
    subject: str,
    *settings: Any,
    engine: Engine,
    progress: Progress | None = None,
) -> Any:
    """Does a stage that takes its runs together, here or on one worker of a cluster, and returns what it returns.

    Args:
      name: of the stage, for messages.
      stage: a function at the top level of a module, called with `settings`, in this process also with `progress`.
      subject: what it makes, for messages.
      settings: of the stage, the runs among them.
      engine: where it is done.
      progress: shows how far it is; None for a stage that shows nothing.

    Raises:
      InputError: the stage was refused.
    """
    if not engine.spreads:
        return stage(*settings, **({} if progress is None else {"progress": progress}))
    (made,) = engine.run([Unit(name, subject, stage, settings)], lambda done: None)
    return made
