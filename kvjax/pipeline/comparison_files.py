"""Writes the files of a comparison together: arrays, figures, page, and the document with the hashes of all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from kvjax.artifacts.files import FileHash, replace_together
from kvjax.artifacts.layout import ComparisonLayout
from kvjax.artifacts.tables import write_datasets
from kvjax.errors import InputError
from kvjax.report.charts.description import Chart
from kvjax.report.figures import save_charts

if TYPE_CHECKING:
    import xarray as xr


def write_comparison_files(
    layout: ComparisonLayout,
    document: dict[str, Any],
    *,
    groups: Sequence[tuple[str | None, xr.Dataset]],
    charts: Iterable[Chart],
    page: str,
    write: Callable[..., None],
) -> None:
    """Writes a comparison: all files, or none of them.

    Args:
      layout: where they go.
      document: the comparison; gets `arrays` and `files`, the hashes of the others.
      groups: of the arrays, see `write_datasets`.
      charts: the figures.
      page: the text to read.
      write: writes the document, as `write_comparison` does.

    Raises:
      InputError: a file cannot be written; the earlier ones stay.
    """
    with replace_together() as files:
        write_datasets(layout.arrays, groups, replace=files.file)
        beside = [*save_charts(charts, layout.figures, replace=files.file), layout.page]
        with files.file(layout.page) as partial:
            partial.write_text(page, encoding="utf-8")
        document["arrays"] = dataclasses.asdict(files.hash(layout.arrays))
        document["files"] = {
            path.relative_to(layout.path).as_posix(): dataclasses.asdict(files.hash(path)) for path in beside
        }
        write(layout.comparison, document, replace=files.file)


def check_comparison_files(
    layout: ComparisonLayout, arrays: FileHash, files: dict[str, FileHash], *, remedy: str
) -> None:
    """Compares the files of a comparison with the hashes that its document records.

    Raises:
      InputError: a file is missing, or has another content.
    """
    for path, recorded in [(layout.arrays, arrays), *((layout.path / name, one) for name, one in files.items())]:
        if not path.resolve().is_relative_to(layout.path.resolve()):
            raise InputError(f"{layout.comparison}: expected files of its own folder; found {path}")
        recorded.check(path, recorded_in=layout.comparison, remedy=remedy)
