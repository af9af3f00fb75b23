"""Names what sets a seed apart from the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import stdtr

from kvjax.compare.variation import known_number

FEWEST_SEEDS = 4  # two others have no spread to speak of
LEVEL = 0.01  # share of summaries of equal, normal seeds in which any seed is named


def outliers(values: Sequence[float | None], resolution: Sequence[float | None] | float = 0.0) -> list[int]:
    """Finds the seeds whose value is unlike the others'.

    The largest of some values always lies outside the range of the rest. So a seed is named only if its deviation from
    the others' mean is significant as well: the deleted studentised residual, at `LEVEL` over all seeds (Bonferroni).
    Source: Cook and Weisberg, Residuals and Influence in Regression (1982), section 2.2. What a value is known to adds
    to its error, for others that agree on a grid of checkpoints or reads are not without spread.

    Args:
      values: one per seed; None or NaN if it has none, which is not judged here.
      resolution: standard error to which each value is known, or all are; None as 0.
    """
    numbers = np.array([np.nan if value is None else value for value in values], float)
    given = np.broadcast_to(np.asarray(resolution, dtype=object), numbers.shape)
    squares = np.array([0.0 if error is None or not np.isfinite(error) else error**2 for error in given], float)
    known = np.flatnonzero(np.isfinite(numbers))
    count = len(known)
    if count < FEWEST_SEEDS:
        return []
    found = []
    for index in known.tolist():
        rest = known[known != index]
        others = numbers[rest]
        if others.min() <= numbers[index] <= others.max():
            continue
        square = others.var(ddof=1) * (1 + 1 / (count - 1)) + squares[index] + squares[rest].mean() / (count - 1)
        distance = abs(numbers[index] - others.mean())
        # Without any spread there is nothing to judge by.
        if square > 1e-24 * distance**2 and 2 * stdtr(count - 2, -distance / np.sqrt(square)) < LEVEL / count:
            found.append(index)
    return found


def outlying_stretches(
    values_RxC: np.ndarray, resolution_RxC: np.ndarray | float = 0.0, *, persistence: int
) -> list[tuple[int, int, int]]:
    """Finds stretches of steps over which a seed's trajectory is unlike the others'.

    Args:
      values_RxC: one trajectory per seed.
      resolution_RxC: standard error to which each value is known.
      persistence: further steps, directly after, for which it must hold.

    Returns:
      (seed, first step, last step) as indices: the longest stretch of each seed that has one.
    """
    runs, steps = values_RxC.shape
    outside = np.zeros((runs, steps), bool)
    errors_RxC = np.broadcast_to(resolution_RxC, values_RxC.shape)
    for step in range(steps):
        outside[outliers(values_RxC[:, step].tolist(), errors_RxC[:, step].tolist()), step] = True
    found = []
    for index in range(runs):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], outside[index].astype(int), [0]])))
        stretches = [(int(first), int(end) - 1) for first, end in zip(edges[::2], edges[1::2], strict=True)]
        stretches = [(first, last) for first, last in stretches if last - first >= persistence]
        if stretches:
            first, last = max(stretches, key=lambda pair: pair[1] - pair[0])
            found.append((index, first, last))
    return found


def named_outliers(
    what: str, names: Sequence[str], values: Sequence[float | None], indices: Sequence[int]
) -> list[dict[str, Any]]:
    """Describes what sets seeds apart, ready for `OutlierEntry`.

    Args:
      what: the summary.
      names, values: of all seeds.
      indices: of those that stand apart.
    """
    rows = []
    for index in indices:
        others = [value for i, value in enumerate(values) if i != index and value is not None and np.isfinite(value)]
        ends = {"others_low": min(others, default=None), "others_high": max(others, default=None)}
        rows.append({"run": names[index], "what": what, "found": known_number(values[index]), **ends})
    return rows
