"""How far results are apart: the largest difference between documents or arrays, and where it is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest difference between two results.

    Attributes:
      size: relative; infinite if one lacks what the other has.
      where: the name of the number.
    """

    size: float = 0.0
    where: str = ""


def between_documents(mine: Any, theirs: Any, *, where: str, floor: float = 0.0) -> Difference:
    """Finds the largest relative difference between two JSON documents; of unequal forms it is infinite.

    Args:
      mine, theirs: the documents.
      where: what they are, which the names of numbers start with.
      floor: what smaller numbers count as when differences are divided by them, so that rounding of what is nearly 0
        is not large.
    """
    if _is_number(mine) and _is_number(theirs):
        scale = max(abs(mine), abs(theirs), floor)
        return Difference(abs(mine - theirs) / scale if scale else 0.0, where)
    if isinstance(mine, dict) and isinstance(theirs, dict) and mine.keys() == theirs.keys():
        parts = [(mine[name], theirs[name], f"{where} {name}") for name in mine]
    elif isinstance(mine, list | tuple) and isinstance(theirs, list | tuple) and len(mine) == len(theirs):
        pairs = enumerate(zip(mine, theirs, strict=True))
        parts = [(one, other, f"{where}[{_label(one, index)}]") for index, (one, other) in pairs]
    else:
        same = mine == theirs and isinstance(mine, bool) == isinstance(theirs, bool)  # for Python, 1 is True
        return Difference(0.0 if same else math.inf, where)
    return largest(between_documents(one, other, where=name, floor=floor) for one, other, name in parts)


def largest(differences: Iterable[Difference]) -> Difference:
    """Finds the largest of some differences."""
    return max(differences, key=lambda difference: difference.size, default=Difference())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _label(entry: Any, index: int) -> str:
    """Names an entry of a list: by its step, if it is the row of one."""
    return f"step {entry['step']}" if isinstance(entry, dict) and "step" in entry else str(index)


def between_arrays(mine: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], *, where: str) -> Difference:
    """Finds the largest difference between arrays of the same names, relative to the largest number of each array."""
    if mine.keys() != theirs.keys():
        name = min(mine.keys() ^ theirs.keys())
        return Difference(math.inf, f"{where} {name}")
    return largest(Difference(_apart(mine[name], theirs[name]), f"{where} {name}") for name in mine)


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape or a.dtype.kind not in "fiub" or b.dtype.kind not in "fiub":
        return 0.0 if a.shape == b.shape and np.array_equal(a, b) else math.inf
    a, b = a.astype(float), b.astype(float)
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(np.where(finite, 0.0, a), np.where(finite, 0.0, b), equal_nan=True):
        return math.inf
    scale = np.abs(a[finite]).max(initial=0.0) or 1.0
    return float(np.abs(a - b)[finite].max(initial=0.0) / scale)
