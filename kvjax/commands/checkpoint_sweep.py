"""Measure every checkpoint of one or several runs: behaviour, residual stream, heads, MLPs.

Each run gets, in its analysis folder, one row per checkpoint (checkpoint_metrics.jsonl), every array labelled
(checkpoint_metrics.nc), full component tables (component_candidates/) and the provenance (sweep.json). Checkpoints
measured before are not measured again.
"""

from __future__ import annotations

from kvjax.commands.flags import flags_for
from kvjax.commands.runtime import engine_of, group_of, progress_of, start_jax
from kvjax.pipeline.settings import (
    Display,
    FollowSettings,
    ProcessSettings,
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
    ProcessSettings,
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
    processes: ProcessSettings,
    workplace: WorkplaceSettings,
    display: Display,
    runtime: Runtime,
) -> int:
    check_logistic_steps(inputs, settings)
    # The others get all settings with their shares, but for how JAX runs.
    command = ["checkpoint-sweep", *flags_for(runs, runtime)]
    command += [f"--memory_gb={settings.memory_gb}"] if settings.memory_gb is not None else []
    with group_of(processes, workplace, command) as group:
        start_jax(runtime, memory_gb=settings.memory_gb)
        if group is not None and not group.leads:
            from kvjax.pipeline.shared_sweep import ShareWorker

            return group.serve(ShareWorker())

        from kvjax.pipeline.follow import follow
        from kvjax.pipeline.sweep import check_usable, sweep_over_runs
        from kvjax.pipeline.text import print_sweep_example
        from kvjax.report.text import print_sweep_reports

        given = (runs, inputs, settings, progress_of(display), results, engine_of(workplace, runtime))
        rounds = follow(*given, group=group) if following.follow else [sweep_over_runs(*given, group=group)]
        for reports in rounds:
            print_sweep_reports(reports)
        check_usable(reports)
        print_sweep_example(reports[0].run)
        return 0
