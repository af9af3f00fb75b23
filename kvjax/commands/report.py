"""Put everything that was measured on runs into one HTML file that needs no network: what, when, where, who, how sure.

Tells one run in full, and compares several first. Of a result that is missing the page names the command that makes it.
`--figures_dir` writes every chart as PNG and SVG as well, for papers.
"""

from __future__ import annotations

from kvjax.commands.runtime import progress_of, start_jax
from kvjax.pipeline.settings import Display, ReportSettings, Runtime

SETTINGS = (ReportSettings, Display, Runtime)


def run(settings: ReportSettings, display: Display, runtime: Runtime) -> None:
    from kvjax.pipeline.report import report
    from kvjax.pipeline.text import print_report

    start_jax(runtime)
    print_report(report(settings, progress_of(display)))
