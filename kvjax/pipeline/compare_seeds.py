"""The stage that compares runs of different seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from kvjax.artifacts.comparison_schema import read_comparison, write_comparison
from kvjax.artifacts.find_runs import find_run_dirs
from kvjax.artifacts.layout import ComparisonLayout
from kvjax.artifacts.run_dir import RunDir
from kvjax.compare.aligned import SweptRun, named_runs
from kvjax.compare.findings import findings
from kvjax.compare.labelled import groups_of
from kvjax.compare.seeds import SeedComparison, compare
from kvjax.compare.settings import CompareSettings
from kvjax.errors import InputError, bad_argument
from kvjax.pipeline.comparison_files import check_comparison_files, write_comparison_files
from kvjax.pipeline.current import Current
from kvjax.pipeline.settings import ComparisonOutput, Runs
from kvjax.report.comparison_charts import comparison_charts
from kvjax.report.comparison_page import page

FEWEST_RUNS = 2


@dataclasses.dataclass(frozen=True)
class WrittenComparison:
    """A comparison and where its files are."""

    layout: ComparisonLayout
    comparison: SeedComparison


def compare_runs(runs: Runs, settings: CompareSettings) -> SeedComparison:
    """Compares runs and states the findings; writes nothing.

    Raises:
      InputError: there are fewer than two runs, one lacks its sweep or birth windows, or they cannot be compared.
    """
    found = find_run_dirs(runs.run_dirs, needs="checkpoints")
    if len(found) < FEWEST_RUNS:
        raise bad_argument("run_dirs", "two or more runs to compare", f"{len(found)}, {found[0].path}")
    return compare_swept(named_runs(found), settings)


def compare_swept(runs: Sequence[SweptRun], settings: CompareSettings) -> SeedComparison:
    """Compares runs that have names, and states the findings; raises `InputError` as `compare_runs`."""
    made = compare(runs, settings)
    made.document["findings"] = findings(made.document)
    return made


def compare_seeds(runs: Runs, settings: CompareSettings, output: ComparisonOutput) -> WrittenComparison:
    """Compares runs and writes `comparison.json`, `.nc`, `.md` and figures.

    `comparison.json` comes last and holds the hashes of the others, so that an interrupted call leaves no mixed result
    that is taken for a whole one.

    Raises:
      InputError: the runs cannot be compared (see `compare_runs`), or a file cannot be written.
    """
    made, layout = compare_runs(runs, settings), ComparisonLayout(Path(output.output_dir))
    write_comparison_files(
        layout,
        made.document,
        groups=groups_of(made.dataset, made.document),
        charts=comparison_charts(made.document, made.dataset),
        page=page(made.document),
        write=write_comparison,
    )
    return WrittenComparison(layout, made)


def comparison_is_current(runs: Sequence[RunDir], output_dir: Path) -> Current:
    """Says whether a folder holds a comparison of exactly these runs as they are measured now."""
    layout = ComparisonLayout(output_dir)
    path = layout.comparison
    if not path.is_file():
        return Current(False, f"{path} does not exist")
    try:
        found = read_comparison(path)
        check_comparison_files(layout, found.arrays, found.files, remedy="run kvjax compare-seeds again")
        now = {one.name: one.made_from for one in named_runs(runs)}
    except InputError as error:
        return Current(False, str(error))
    then = {one.name: (one.sweep_sha256, one.story_sha256) for one in found.runs}
    if then != now:
        return Current(False, f"{path} compares {len(then)} runs as they were measured before")
    return Current(True, f"{path} compares these runs")
