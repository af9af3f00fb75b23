"""Go from a training config, or from runs that exist, to results: the whole study in one command.

Draws the benchmark, trains the seeds, chooses the probe set, measures every checkpoint, finds windows, evaluates full
splits, intervenes in the windows and compares the seeds. A stage whose results are current is skipped, so that a
stopped study goes on where it was.
"""

from __future__ import annotations

from kvjax.commands.runtime import engine_of, progress_of, start_jax
from kvjax.pipeline.settings import Display, PipelineSettings, Runtime, WorkplaceSettings

SETTINGS = (PipelineSettings, WorkplaceSettings, Display, Runtime)


def run(settings: PipelineSettings, workplace: WorkplaceSettings, display: Display, runtime: Runtime) -> None:
    from kvjax.pipeline.pipeline import print_summary, run_pipeline

    start_jax(runtime)
    print_summary(settings, run_pipeline(settings, progress_of(display), engine_of(workplace, runtime)))
