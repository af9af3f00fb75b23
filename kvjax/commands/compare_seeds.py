"""Compare runs that differ in their seed: what formed in how many, when, in which order, and which heads carry it.

The runs need a sweep on one probe set and birth windows. A run in which something has not formed counts as such, and is
not left out. Heads are matched by role, for the same role can sit at another address. Writes comparison.json,
comparison.nc, comparison.md and figures.
"""

from __future__ import annotations

from kvjax.commands.runtime import engine_of
from kvjax.compare.settings import CompareSettings
from kvjax.pipeline.settings import ComparisonOutput, Runs, WorkplaceSettings

SETTINGS = (Runs, CompareSettings, ComparisonOutput, WorkplaceSettings)


def run(runs: Runs, settings: CompareSettings, output: ComparisonOutput, workplace: WorkplaceSettings) -> None:
    from kvjax.pipeline.compare_seeds import compare_seeds
    from kvjax.pipeline.over_runs import on_all_runs
    from kvjax.pipeline.text import print_comparison

    given, engine = (output.output_dir, runs, settings, output), engine_of(workplace)
    print_comparison(on_all_runs("comparison", compare_seeds, *given, engine=engine))
