"""Whether comparisons of runs, and factors of a screen, are what their runs give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from kvjax.artifacts.comparison_schema import ComparedRun, Comparison, read_comparison
from kvjax.artifacts.differences import Difference, between_arrays, between_documents, largest
from kvjax.artifacts.factor_schema import FactorComparison, ScreenedRun, read_factor
from kvjax.artifacts.files import FileHash
from kvjax.artifacts.layout import ComparisonLayout
from kvjax.artifacts.results import RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.tables import read_dataset
from kvjax.compare.aligned import SweptRun
from kvjax.compare.labelled import groups_of
from kvjax.compare.settings import CompareSettings
from kvjax.errors import InputError
from kvjax.pipeline.checks import REDRAWN, SEALED, Check, Verified, compared, listed, made_again
from kvjax.pipeline.compare_seeds import compare_swept
from kvjax.pipeline.comparison_files import check_comparison_files

_Document = TypeVar("_Document", Comparison, FactorComparison)

_REMEDY = {"comparison": "run kvjax compare-seeds again", "factor": "run kvjax factor-screen again"}
# Of a comparison, beside its numbers; the runs' stories are compared on their own.
_MADE_ANEW = dict.fromkeys(("versions", "arrays", "files", "content_sha256"), True) | {
    "runs": {"__all__": {"story_sha256"}}
}


def verify_comparison(folder: Path, *, again: bool) -> Verified:
    """Compares a comparison of runs with the hashes it records, with its runs as they are, and with one made again.

    Args:
      folder: of the comparison.
      again: whether to make it again.
    """
    layout = ComparisonLayout(folder)
    return Verified(f"comparison in {folder}", list(_comparison_checks(layout, again=again)))


def verify_factor(folder: Path) -> Verified:
    """Compares a factor of a screen with the hashes it records, and with its runs as they are."""
    return Verified(f"factor in {folder}", list(_factor_checks(ComparisonLayout(folder, "factor"))))


def _comparison_checks(layout: ComparisonLayout, *, again: bool) -> Iterator[Check]:
    document, checks = _opened(layout, read_comparison)
    yield from checks
    if document is None:
        return
    runs = _runs(document.runs)
    yield runs
    subject = f"{layout.comparison.name}, compared again"
    if not again or runs.verdict != "holds":
        yield Check(subject, "open", "not every run is as it was compared" if again else "the sample is 0")
    else:
        yield made_again(subject, lambda: _compare_again(layout, document), REDRAWN)


def _factor_checks(layout: ComparisonLayout) -> Iterator[Check]:
    document, checks = _opened(layout, read_factor)
    yield from checks
    if document is None:
        return
    yield _runs([run for entry in document.settings for run in entry.runs if run.sweep_sha256 is not None])
    subject = f"{layout.comparison.name}, compared again"
    yield Check(subject, "open", "factors are not compared again; seeds of a setting are")


def _opened(layout: ComparisonLayout, read: Callable[[Path], _Document]) -> tuple[_Document | None, list[Check]]:
    """Reads a document, and compares it and the files beside it with their hashes; gives None if it is not whole."""
    name = layout.comparison.name
    try:
        document = read(layout.comparison)
    except InputError as error:
        return None, [Check(name, "differs", str(error))]
    return document, [Check(name, "holds", SEALED), _files(layout, document.arrays, document.files)]


def _files(layout: ComparisonLayout, arrays: FileHash, files: dict[str, FileHash]) -> Check:
    recorded = f"arrays, page and {len(files) - 1} figures" if files else "arrays"
    found = compared(
        "files",
        lambda: check_comparison_files(layout, arrays, files, remedy=_REMEDY[layout.stem]),
        f"{recorded} have the hashes in {layout.comparison.name}",
    )
    if found.verdict == "holds" and not files:
        return Check("files", "open", f"{found.reason}; an older version recorded none of the page and the figures")
    return found


def _runs(runs: Sequence[ComparedRun | ScreenedRun]) -> Check:
    """Compares the runs with what their sweeps and stories were."""
    changed, gone = [], []
    for one in runs:
        try:
            sweep_sha256, story_sha256 = SweptRun(one.name, RunResults(RunDir.open(Path(one.path)))).made_from
        except InputError:
            gone.append(one.path)
            continue
        if sweep_sha256 != one.sweep_sha256 or one.story_sha256 not in ("", None, story_sha256):
            changed.append(one.path)
    if changed:
        return Check("runs", "differs", f"measured again since they were compared: {listed(changed)}")
    if gone:
        return Check("runs", "open", f"no results that can be read any more: {listed(gone)}")
    return Check("runs", "holds", f"sweeps and stories of {len(runs)} runs are those that were compared")


def _compare_again(layout: ComparisonLayout, document: Comparison) -> Difference:
    swept = [SweptRun(one.name, RunResults(RunDir.open(Path(one.path)))) for one in document.runs]
    made = compare_swept(swept, CompareSettings(**document.settings))
    now = Comparison.model_validate(made.document | {"arrays": document.arrays})
    theirs, ours = (one.model_dump(mode="json", exclude=_MADE_ANEW) for one in (document, now))
    found = [between_documents(theirs, ours, where=layout.comparison.name)]
    for group, dataset in groups_of(made.dataset, made.document):
        stored = read_dataset(layout.arrays, group=group, expected="the arrays of a comparison")
        before, after = ({str(n): v.values for n, v in one.variables.items()} for one in (stored, dataset))
        found.append(between_arrays(before, after, where=f"{layout.arrays.name}/{group or ''}"))
    return largest(found)
