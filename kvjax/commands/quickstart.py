"""See a lookup mechanism form: draw a benchmark, train two seeds, measure every checkpoint, find what formed when.

Takes a few minutes on two CPU cores. Run again, it goes on where it stopped and repeats nothing that is there.
"""

from __future__ import annotations

from kvjax.commands.runtime import engine_of, progress_of, start_jax
from kvjax.pipeline.settings import Display, QuickstartSettings, Runtime, WorkplaceSettings

SETTINGS = (QuickstartSettings, WorkplaceSettings, Display, Runtime)


def run(settings: QuickstartSettings, workplace: WorkplaceSettings, display: Display, runtime: Runtime) -> None:
    from kvjax.pipeline.quickstart import quickstart, run_globs
    from kvjax.pipeline.text import print_next, print_report

    start_jax(runtime)
    written = quickstart(settings, progress_of(display), engine_of(workplace, runtime))
    print_next("status", run_dirs=run_globs(settings))
    print_report(written)
