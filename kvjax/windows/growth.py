"""Compares shifts with steady growth over the whole run: which of the two explains a trajectory better.

A few checkpoints of a ramp look like a shift, and are too few to measure its rate beside it. Two models with the same
number of terms can still be told apart. Source: docs/birth_windows.md, "Ramps".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from kvjax.windows.group_shifts import Shift
from kvjax.windows.trajectories import Trajectories

# A shift must be so many times as likely as growth.
_LIKELIHOOD_RATIO = 4
# So many trajectories that shift together say that something happened to the others as well.
_SEVERAL = 2
# Of a trajectory's variance: residuals below it are rounding.
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """A shift beside growth.

    Attributes:
      log_ratio: of the likelihood of the shift to that of growth.
      beyond: whether the shift is one even beside growth.
    """

    log_ratio: float
    beyond: bool


def growing(
    shifts: Sequence[Shift], run: Trajectories, floor_M: np.ndarray, *, threshold: float, side: int
) -> frozenset[Shift]:
    """Finds the shifts that steady growth explains as well.

    One model of a trajectory has a step at each of its shifts, and at the gaps where others shift. The second has,
    instead of the step in question, growth that is even in steps or in log steps, whichever fits better. Both have
    normal errors of unknown size. Growth explains the shift unless the step makes the trajectory 4 times as likely, in
    the geometric mean over the splits on which the same measure shifts in the same gap or a touching one.

    It explains no shift that stands out of growth: beside a mixture of growth that is even in steps, log steps and
    checkpoints, the step still reaches its floor and the threshold.

    Args:
      shifts: of the run, those that reach the threshold.
      run: its trajectories.
      floor_M: smallest shift of each metric that means anything.
      threshold: score to reach.
      side: checkpoints averaged on each side of a gap.
    """
    of_metric: dict[int, list[Shift]] = {}
    of_measure: dict[str, list[Shift]] = {}
    for shift in shifts:
        of_metric.setdefault(shift.metric, []).append(shift)
        of_measure.setdefault(_measure(run, shift), []).append(shift)
    busy = _busy_gaps(shifts)
    compared = {
        shift: _compare(
            shift,
            _elsewhere(shift, [other.gap for other in of_metric[shift.metric] if other is not shift], busy),
            run.values_CxM[:, shift.metric],
            run.steps,
            floor=floor_M[shift.metric],
            threshold=threshold,
            side=side,
        )
        for shift in shifts
    }

    def explained(shift: Shift) -> bool:
        near = [other for other in of_measure[_measure(run, shift)] if abs(other.gap - shift.gap) <= 1]
        return bool(np.mean([compared[other].log_ratio for other in near]) <= np.log(_LIKELIHOOD_RATIO))

    return frozenset(shift for shift in shifts if not compared[shift].beyond and explained(shift))


def _busy_gaps(shifts: Sequence[Shift]) -> list[int]:
    """Lists the gaps in or beside which several trajectories shift, the busiest first and none beside another."""
    left, busy = [shift.gap for shift in shifts], []
    while left:
        gap = max(sorted(set(left)), key=left.count)
        near = [other for other in left if abs(other - gap) <= 1]
        left = [other for other in left if abs(other - gap) > 1]
        if len(near) >= _SEVERAL:
            busy.append(gap)
    return busy


def _elsewhere(shift: Shift, own: Sequence[int], busy: Sequence[int]) -> list[int]:
    """Adds to the gaps of a trajectory's other shifts those at which others shift, if it has none there."""
    return [*own, *(gap for gap in busy if all(abs(gap - known) > 1 for known in (*own, shift.gap)))]


def _measure(run: Trajectories, shift: Shift) -> str:
    """Names the measure of a shift, which held-out accuracy shares with accuracy."""
    return run.metrics[shift.metric].measure.removeprefix("heldout_")


def _compare(
    shift: Shift,
    others: Sequence[int],
    values_C: np.ndarray,
    steps_C: np.ndarray,
    *,
    floor: float,
    threshold: float,
    side: int,
) -> _Comparison:
    """Fits a step at the shift's gap and growth, each beside steps at the metric's other shifts."""
    there = np.isfinite(values_C)
    values, index = values_C[there], np.flatnonzero(there)
    common = [np.ones(len(values)), *((index > gap).astype(float) for gap in others)]
    step = (index > shift.gap).astype(float)
    rounding = _ROUNDING * values.var() + np.finfo(float).tiny
    left_by_step = _squared_residuals([*common, step], values)
    curves = _growth_curves(steps_C[there])
    left_by_growth = min(_squared_residuals([*common, curve], values) for curve in curves)
    log_ratio = len(values) / 2 * np.log((left_by_growth + rounding) / (left_by_step + rounding))
    # A mixture of shapes, because growth of a shape between them would leave a step over.
    mixture = [*curves, np.arange(len(values), dtype=float)]
    size, error = _step_beside([*common, *mixture], step, values)
    size, error = np.sign(shift.size) * size, error * _checkpoint_noise(shift, len(values_C), side=side)
    return _Comparison(float(log_ratio), bool(size >= floor and size >= threshold * error))


def _growth_curves(steps: np.ndarray) -> list[np.ndarray]:
    """Makes growth from 0 to 1 over a run, even in steps and in their logarithms; step 0 counts as 1."""
    curves = [steps.astype(float), np.log1p(steps.astype(float))]
    return [(curve - curve[0]) / (curve[-1] - curve[0]) for curve in curves]


def _squared_residuals(terms: Sequence[np.ndarray], values: np.ndarray) -> float:
    design = np.stack(terms, axis=1)
    left = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    return float(left @ left)


def _step_beside(terms: Sequence[np.ndarray], step: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Fits a step beside other terms.

    Returns:
      Its size, and its standard error for values of standard deviation 1: infinite if the terms hold the step, or if
      nothing is left over to check it.
    """
    design = np.stack(terms, axis=1)
    if len(values) <= design.shape[1] + 1:
        return 0.0, np.inf
    alone = step - design @ np.linalg.lstsq(design, step, rcond=None)[0]
    weight = float(alone @ alone)
    if weight < _ROUNDING * len(values):
        return 0.0, np.inf
    return float(alone @ values) / weight, weight**-0.5


def _checkpoint_noise(shift: Shift, checkpoints: int, *, side: int) -> float:
    """Computes the standard deviation of one checkpoint from a shift's noise, that of two averages' difference."""
    before, after = min(side, shift.gap + 1), min(side, checkpoints - 1 - shift.gap)
    return shift.noise / np.sqrt(1 / before + 1 / after)
