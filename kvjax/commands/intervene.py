"""Intervene inside birth windows: what carries the behaviour, and how information flows.

In every checkpoint of a window: activation and path patching between clean and corrupted streams, necessity and
sufficiency of component sets, states across checkpoints, residual subspaces, neurons, attribution patching. Each kind
gets, under analysis/interventions/, a readable summary (.json) and every number (.nc). What was measured before is not
measured again, so that a call that was stopped goes on where it was.
"""

from __future__ import annotations

from kvjax.commands.runtime import engine_of, progress_of, start_jax
from kvjax.intervene.settings import InterventionSettings
from kvjax.pipeline.settings import Display, PairSource, ResultSettings, RunsOnBenchmark, Runtime, WorkplaceSettings

SETTINGS = (RunsOnBenchmark, PairSource, InterventionSettings, ResultSettings, WorkplaceSettings, Display, Runtime)


def run(
    runs: RunsOnBenchmark,
    source: PairSource,
    settings: InterventionSettings,
    results: ResultSettings,
    workplace: WorkplaceSettings,
    display: Display,
    runtime: Runtime,
) -> None:
    from kvjax.pipeline.interventions import intervene
    from kvjax.pipeline.over_runs import over_runs
    from kvjax.report.text import print_intervention_reports

    start_jax(runtime)
    work = {"progress": progress_of(display), "results": results, "engine": engine_of(workplace, runtime)}
    print_intervention_reports(over_runs("interventions", intervene, runs, source, settings, **work))
