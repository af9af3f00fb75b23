"""Find the comparisons of runs, and the factors of screens, that a person names."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from kvjax.artifacts.layout import ComparisonLayout
from kvjax.errors import bad_argument

_MAKES = {"comparison": "kvjax compare-seeds", "factor": "kvjax factor-screen"}


def find_comparison_dirs(
    names: Iterable[str], *, parameter: str, stem: Literal["comparison", "factor"] = "comparison"
) -> list[Path]:
    """Lists the folders of comparisons that texts name, globs expanded.

    Args:
      names: directories and globs.
      parameter: the argument that they come from, for the error.
      stem: of the files of a comparison, or of a factor.

    Raises:
      InputError: a text names no such folder.
    """
    folders: list[Path] = []
    for name in names:
        matches = [Path(name)] if Path(name).is_dir() else sorted(map(Path, glob.glob(name)))
        found = [path for path in matches if ComparisonLayout(path, stem).comparison.is_file()]
        if not found:
            raise bad_argument(parameter, f"folders with a {stem}.json (run {_MAKES[stem]})", name)
        folders += found
    return folders
