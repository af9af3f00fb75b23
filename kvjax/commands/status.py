"""Say which of the four conditions for circuit work each run meets, why, and what to run next.

They are: reference fixed, probe set fixed, sweep complete, windows identified. Then it tells what happened in the run,
in full if it is the only one. Only reads; nothing is measured.
"""

from __future__ import annotations

from kvjax.commands.runtime import engine_of
from kvjax.pipeline.progress import no_progress
from kvjax.pipeline.settings import Runs, StatusSettings, WorkplaceSettings

SETTINGS = (Runs, StatusSettings, WorkplaceSettings)


def run(runs: Runs, settings: StatusSettings, workplace: WorkplaceSettings) -> None:
    from kvjax.pipeline.over_runs import over_runs
    from kvjax.pipeline.status import check_all_ready, status
    from kvjax.pipeline.text import print_readiness

    states = over_runs("status", status, runs, progress=no_progress, engine=engine_of(workplace))
    print_readiness(states, reasons=settings.reasons)
    if settings.require:
        check_all_ready(states)
