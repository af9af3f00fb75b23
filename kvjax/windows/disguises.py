"""Finds shifts that are another one in disguise: the same event, seen through a second measure of the same numbers.

Accuracy without a component that nothing is answered without is 0, so that its drop is the accuracy itself. A margin
against one competitor and the margin against the best are the same while that one is the best. Such a second shift is
no second piece of evidence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kvjax.windows.group_shifts import Shift
from kvjax.windows.trajectories import Trajectories

# Correlation of two shifts over paired resamples from which on they share their noise: 81 % of the variance.
_SAME = 0.9


def origins(shifts: Sequence[Shift], run: Trajectories, *, side: int) -> Mapping[Shift, Shift]:
    """Maps each shift to the one that it repeats, or to itself.

    Two shifts on one split, at the same gap or touching ones, are the same if their sizes go together over the paired
    resamples: |correlation| of 0.9 or more. If resamples do not vary, both trajectories must be equal in every value.
    The one declared first is the origin: measures of reads come before components.

    Args:
      shifts: of a run.
      run: its trajectories and resamples.
      side: checkpoints averaged on each side of a gap.
    """
    origin: dict[Shift, Shift] = {}
    first_of: dict[str, list[Shift]] = {}
    sizes: dict[tuple[int, int], np.ndarray] = {}

    def resampled(metric: int, gap: int) -> np.ndarray:
        if (metric, gap) not in sizes:
            samples = run.samples_JxCxM[:, :, metric]
            before, after = samples[:, max(0, gap - side + 1) : gap + 1], samples[:, gap + 1 : gap + 1 + side]
            sizes[metric, gap] = _mean(after) - _mean(before)
        return sizes[metric, gap]

    for shift in sorted(shifts, key=lambda shift: (shift.metric, shift.gap)):
        metric = run.metrics[shift.metric]
        origin[shift] = shift
        if not metric.resampled:
            continue
        others = first_of.setdefault(metric.split, [])
        for other in others:
            if other.metric == shift.metric or abs(other.gap - shift.gap) > 1:
                continue
            mine, its = resampled(shift.metric, other.gap), resampled(other.metric, other.gap)
            if _go_together(mine, its) or _equal(run.values_CxM, shift.metric, other.metric, mine, its):
                origin[shift] = other
                break
        else:
            others.append(shift)
    return origin


def _go_together(mine_J: np.ndarray, its_J: np.ndarray) -> bool:
    both = np.isfinite(mine_J) & np.isfinite(its_J)
    if not (_varies(mine_J[both]) and _varies(its_J[both])):
        return False
    return bool(abs(np.corrcoef(mine_J[both], its_J[both])[0, 1]) >= _SAME)


def _equal(values_CxM: np.ndarray, one: int, other: int, mine_J: np.ndarray, its_J: np.ndarray) -> bool:
    still = not (_varies(mine_J[np.isfinite(mine_J)]) or _varies(its_J[np.isfinite(its_J)]))
    return still and bool(np.allclose(values_CxM[:, one], values_CxM[:, other], atol=1e-6, equal_nan=True))


def _varies(sizes: np.ndarray) -> bool:
    return len(sizes) > 1 and bool(sizes.std() > 1e-6 * max(1.0, np.abs(sizes).max()))


def _mean(samples_JxC: np.ndarray) -> np.ndarray:
    """Averages the finite values of each resample; NaN if there is none."""
    there = np.isfinite(samples_JxC)
    count = there.sum(axis=1)
    total = np.where(there, samples_JxC, 0.0).sum(axis=1, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
