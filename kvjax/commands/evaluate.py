"""Evaluate one checkpoint of each run on full splits of the benchmark.

Prints answer accuracy per split and writes everything to analysis/evaluation/<checkpoint>.json beside each run.
"""

from __future__ import annotations

from kvjax.commands.runtime import engine_of, progress_of, start_jax
from kvjax.pipeline.settings import (
    Display,
    EvaluateSettings,
    ResultSettings,
    RunsOnBenchmark,
    Runtime,
    WorkplaceSettings,
)

SETTINGS = (RunsOnBenchmark, EvaluateSettings, ResultSettings, WorkplaceSettings, Display, Runtime)


def run(
    runs: RunsOnBenchmark,
    settings: EvaluateSettings,
    results: ResultSettings,
    workplace: WorkplaceSettings,
    display: Display,
    runtime: Runtime,
) -> None:
    from kvjax.pipeline.evaluate import evaluate
    from kvjax.pipeline.over_runs import over_runs
    from kvjax.pipeline.text import print_evaluations

    start_jax(runtime)
    work = {"progress": progress_of(display), "results": results, "engine": engine_of(workplace, runtime)}
    print_evaluations(over_runs("evaluation", evaluate, runs, settings, needs="checkpoints", **work))
