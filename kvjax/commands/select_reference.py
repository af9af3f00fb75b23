"""Rank runs by their best checkpoint and select the reference.

Held-out pairs decide first, then validation, structural OOD, test and counterfactual accuracy, then fewer parameters;
runs below the minimum validation accuracy are listed, but not eligible. The reasons are written out.
"""

from __future__ import annotations

from kvjax.commands.runtime import engine_of, progress_of, start_jax
from kvjax.pipeline.settings import Display, RunsOnBenchmark, Runtime, SelectSettings, WorkplaceSettings

SETTINGS = (RunsOnBenchmark, SelectSettings, WorkplaceSettings, Display, Runtime)


def run(
    runs: RunsOnBenchmark, settings: SelectSettings, workplace: WorkplaceSettings, display: Display, runtime: Runtime
) -> None:
    from kvjax.pipeline.select_reference import rank_runs
    from kvjax.pipeline.text import print_ranking

    start_jax(runtime)
    ranking = rank_runs(runs, settings, progress_of(display), engine_of(workplace, runtime))
    print_ranking(ranking, settings.output)
