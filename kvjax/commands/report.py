"""Put everything that was measured on runs into one HTML file that needs no network: what, when, where, who, how sure.

Tells one run in full, and compares several first. Of a result that is missing the page names the command that makes it.
`--figures_dir` writes every chart as PNG and SVG as well, for papers.
"""

from __future__ import annotations

from kvjax.commands.runtime import engine_of, progress_of, start_jax
from kvjax.pipeline.settings import Display, ReportSettings, Runtime, WorkplaceSettings

SETTINGS = (ReportSettings, WorkplaceSettings, Display, Runtime)


def run(settings: ReportSettings, workplace: WorkplaceSettings, display: Display, runtime: Runtime) -> None:
    from kvjax.pipeline.over_runs import on_all_runs
    from kvjax.pipeline.report import report, report_path
    from kvjax.pipeline.text import print_report

    start_jax(runtime)
    work = {"progress": progress_of(display), "engine": engine_of(workplace, runtime)}
    print_report(on_all_runs("report", report, str(report_path(settings)), settings, **work))
