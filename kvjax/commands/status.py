"""Say which of the four conditions for circuit work each run meets, why, and what to run next.

They are: reference fixed, probe set fixed, sweep complete, windows identified. Then it tells what happened in the run,
in full if it is the only one. Only reads; nothing is measured.
"""

from __future__ import annotations

from kvjax.pipeline.settings import Runs, StatusSettings

SETTINGS = (Runs, StatusSettings)


def run(runs: Runs, settings: StatusSettings) -> None:
    from kvjax.pipeline.status import check_all_ready, status
    from kvjax.pipeline.text import print_readiness

    states = status(runs)
    print_readiness(states, reasons=settings.reasons)
    if settings.require:
        check_all_ready(states)
