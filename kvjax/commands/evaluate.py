"""Evaluate one checkpoint of each run on full splits of the benchmark.

Prints answer accuracy per split and writes everything to analysis/evaluation/<checkpoint>.json beside each run.
"""

from __future__ import annotations

from kvjax.commands.runtime import progress_of, start_jax
from kvjax.pipeline.settings import Display, EvaluateSettings, ResultSettings, RunsOnBenchmark, Runtime

SETTINGS = (RunsOnBenchmark, EvaluateSettings, ResultSettings, Display, Runtime)


def run(
    runs: RunsOnBenchmark,
    settings: EvaluateSettings,
    results: ResultSettings,
    display: Display,
    runtime: Runtime,
) -> None:
    from kvjax.pipeline.evaluate import evaluate
    from kvjax.pipeline.text import print_evaluations

    start_jax(runtime)
    print_evaluations(evaluate(runs, settings, progress_of(display), results))
