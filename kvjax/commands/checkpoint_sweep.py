"""Measure every checkpoint of one or several runs: behaviour, residual stream, heads, MLPs.

Each run gets, in its analysis folder, one row per checkpoint (checkpoint_metrics.jsonl), every array labelled
(checkpoint_metrics.nc), full component tables (component_candidates/) and the provenance (sweep.json). Checkpoints
measured before are not measured again.
"""

from __future__ import annotations

from kvjax.commands.runtime import engine_of, progress_of, start_jax
from kvjax.pipeline.settings import (
    Display,
    FollowSettings,
    ResultSettings,
    RunsOnBenchmark,
    Runtime,
    SweepInputs,
    WorkplaceSettings,
    check_logistic_steps,
)
from kvjax.sweeps.settings import SweepSettings

SETTINGS = (
    RunsOnBenchmark,
    SweepInputs,
    SweepSettings,
    FollowSettings,
    ResultSettings,
    WorkplaceSettings,
    Display,
    Runtime,
)


def run(
    runs: RunsOnBenchmark,
    inputs: SweepInputs,
    settings: SweepSettings,
    following: FollowSettings,
    results: ResultSettings,
    workplace: WorkplaceSettings,
    display: Display,
    runtime: Runtime,
) -> None:
    check_logistic_steps(inputs, settings)

    from kvjax.pipeline.follow import follow
    from kvjax.pipeline.sweep import check_usable, sweep_over_runs
    from kvjax.pipeline.text import print_sweep_example
    from kvjax.report.text import print_sweep_reports

    start_jax(runtime, memory_gb=settings.memory_gb)
    given = (runs, inputs, settings, progress_of(display), results, engine_of(workplace, runtime))
    rounds = follow(*given) if following.follow else [sweep_over_runs(*given)]
    for reports in rounds:
        print_sweep_reports(reports)
    check_usable(reports)
    print_sweep_example(reports[0].run)
