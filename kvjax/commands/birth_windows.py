"""Find the few checkpoints between which something formed, from the sweep alone, or say that nothing did.

Each run gets analysis/birth_windows.json: a verdict, windows with their triggers, the order in which metrics moved, the
components that mattered before, inside and after, and the births of metrics. analysis/story.md tells in plain words
what happened, in which phases, and which components took over from which. Can be repeated while a run still trains.
"""

from __future__ import annotations

from kvjax.commands.runtime import engine_of, progress_of
from kvjax.pipeline.settings import Display, ResultSettings, Runs, Shown, WindowSettings, WorkplaceSettings

SETTINGS = (Runs, WindowSettings, ResultSettings, WorkplaceSettings, Shown, Display)


def run(
    runs: Runs,
    settings: WindowSettings,
    results: ResultSettings,
    workplace: WorkplaceSettings,
    shown: Shown,
    display: Display,
) -> None:
    from kvjax.artifacts.find_runs import names_of_results
    from kvjax.pipeline.over_runs import over_runs
    from kvjax.pipeline.text import print_next, print_told_windows
    from kvjax.pipeline.windows import find_birth_windows

    work = {"progress": progress_of(display), "results": results, "engine": engine_of(workplace)}
    told = over_runs("search for windows", find_birth_windows, runs, settings, needs="checkpoints", **work)
    print_told_windows(told, show=shown.show)
    print_next("status", run_dirs=names_of_results(runs.run_dirs, results.output_dir))
