"""Vary one factor at a time around a base: depth, width, heads, optimizer settings, curriculum, data.

Trains every value with every seed, measures all checkpoints, and writes one comparison per factor: behaviour, births,
candidates and roles, drift of the residual stream, stability across seeds, and which share of the variance the factor
explains. What is current is skipped, so that a stopped screen goes on where it was. `--dry_run` prints the runs first,
and about what time and disk they take.
"""

from __future__ import annotations

from kvjax.commands.runtime import engine_of, progress_of, start_jax
from kvjax.pipeline.settings import Display, FactorSettings, Runtime, WorkplaceSettings

SETTINGS = (FactorSettings, WorkplaceSettings, Display, Runtime)


def run(settings: FactorSettings, workplace: WorkplaceSettings, display: Display, runtime: Runtime) -> None:
    from kvjax.pipeline.factor_plan import plan_screen
    from kvjax.pipeline.factor_screen import print_screen, run_screen
    from kvjax.pipeline.screen_estimate import print_estimate

    plan = plan_screen(settings)
    start_jax(runtime)
    print_estimate(plan)
    if not settings.dry_run:
        print_screen(run_screen(plan, progress_of(display), engine_of(workplace, runtime)))
