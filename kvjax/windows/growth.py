"""Compares shifts with steady growth, over the whole run or a stretch: which of the two explains a trajectory better.

A few checkpoints of a ramp look like a shift, and are too few to measure its rate beside it; so do those at the end of
a longer ramp. Two models with the same number of terms can still be told apart. Source: docs/birth_windows.md, "Ramps".
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
# Checkpoints on each side of a gap among which growth over a stretch is looked for, and over how many gaps it takes.
_STRETCH_RADIUS = 24
_SHORTEST_GROWTH = 16
# Of a trajectory's variance: residuals below it are rounding.
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class _Least:
    """What a step must reach to be one.

    Attributes:
      floor: its size, in the metric's unit.
      threshold: its size in standard errors.
      noise: standard deviation of one checkpoint.
    """

    floor: float
    threshold: float
    noise: float


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """A shift beside growth.

    Attributes:
      log_ratio: log of the shift's likelihood over that of growth.
      beyond: whether the shift is one even beside that growth.
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

    On a dense run growth over a stretch explains shifts as well. Among the 24 checkpoints on each side of the gap the
    best movement that is even in steps takes fewer than 16 gaps, or more: the shorter one must be 4 times as likely.

    Growth explains no shift that stands out of it: beside a mixture of growth over the run that is even in steps, log
    steps and checkpoints, or beside the best growth over the stretch, a step still reaches its floor and the threshold.

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

    def compare(shift: Shift) -> tuple[_Comparison, _Comparison]:
        values_C = run.values_CxM[:, shift.metric]
        own = [other.gap for other in of_metric[shift.metric] if other is not shift]
        least = _Least(floor_M[shift.metric], threshold, _checkpoint_noise(shift, len(values_C), side=side))
        return (
            _over_run(shift, _elsewhere(shift, own, busy), values_C, run.steps, least),
            _over_stretch(shift, own, values_C, run.steps, least),
        )

    compared = {shift: compare(shift) for shift in shifts}

    def explained(shift: Shift) -> bool:
        near = [other for other in of_measure[_measure(run, shift)] if abs(other.gap - shift.gap) <= 1]
        ratios = np.mean([[one.log_ratio for one in compared[other]] for other in near], axis=0)
        likely = zip(ratios, compared[shift], strict=True)
        return any(ratio <= np.log(_LIKELIHOOD_RATIO) and not one.beyond for ratio, one in likely)

    return frozenset(filter(explained, shifts))


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


def _over_run(
    shift: Shift, others: Sequence[int], values_C: np.ndarray, steps_C: np.ndarray, least: _Least
) -> _Comparison:
    """Compares a step at the shift's gap with growth over the run, each beside steps at other gaps."""
    index = np.flatnonzero(np.isfinite(values_C))
    values, step = values_C[index], (index > shift.gap).astype(float)
    common = [np.ones(len(values)), *((index > gap).astype(float) for gap in others)]
    # Growth from 0 to 1, even in steps and in their logarithms; step 0 counts as 1.
    curves = [_from_0_to_1(curve) for curve in (steps_C[index].astype(float), np.log1p(steps_C[index].astype(float)))]
    by_step = _squared_residuals([*common, step], values)
    by_growth = min(_squared_residuals([*common, curve], values) for curve in curves)
    # A mixture of shapes, because growth of a shape between them would leave a step over.
    mixture = [*common, *curves, np.arange(len(values), dtype=float)]
    return _Comparison(_log_ratio(by_step, by_growth, values), _is_step_beside(mixture, step, values, shift, least))


def _over_stretch(
    shift: Shift, others: Sequence[int], values_C: np.ndarray, steps_C: np.ndarray, least: _Least
) -> _Comparison:
    """Compares a short movement through the shift's gap with a long one; on a short run the shift is none."""
    begin, end = max(0, shift.gap + 1 - _STRETCH_RADIUS), min(len(values_C), shift.gap + 1 + _STRETCH_RADIUS)
    if end - begin < 2 * _SHORTEST_GROWTH:
        return _Comparison(np.inf, beyond=True)
    index = np.arange(begin, end)[np.isfinite(values_C[begin:end])]
    values, step, steps = values_C[index], (index > shift.gap).astype(float), steps_C.astype(float)
    common = [np.ones(len(index)), *((index > gap).astype(float) for gap in others)]
    first, last = (ends.ravel() for ends in np.meshgrid(np.arange(begin, shift.gap + 1), np.arange(shift.gap + 1, end)))
    curves = np.clip((steps[index] - steps[first, None]) / (steps[last] - steps[first])[:, None], 0, 1)
    # What the common terms leave of each curve and of the values; a step outside of the stretch is a constant.
    vectors, singular, _ = np.linalg.svd(np.stack(common, axis=1), full_matrices=False)
    basis = vectors[:, singular > _ROUNDING * singular[0]]
    alone, rest = curves - curves @ basis @ basis.T, values - basis @ (basis.T @ values)
    weights = (alone**2).sum(axis=1)
    told = np.divide((alone @ rest) ** 2, weights, out=np.zeros(len(weights)), where=weights > _ROUNDING)
    left, is_long = np.maximum(rest @ rest - told, 0.0), last - first >= _SHORTEST_GROWTH
    growth = curves[is_long][np.argmin(left[is_long])]
    ratio = _log_ratio(left[~is_long].min(), left[is_long].min(), values)
    return _Comparison(ratio, _is_step_beside([*common, growth], step, values, shift, least))


def _from_0_to_1(curve: np.ndarray) -> np.ndarray:
    return (curve - curve[0]) / (curve[-1] - curve[0])


def _squared_residuals(terms: Sequence[np.ndarray], values: np.ndarray) -> float:
    design = np.stack(terms, axis=1)
    left = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    return float(left @ left)


def _log_ratio(by_step: float, by_growth: float, values: np.ndarray) -> float:
    """Computes the log likelihood ratio of two models from their squared residuals, with errors of unknown size."""
    rounding = _ROUNDING * values.var() + np.finfo(float).tiny
    return float(len(values) / 2 * np.log((by_growth + rounding) / (by_step + rounding)))


def _is_step_beside(
    terms: Sequence[np.ndarray], step: np.ndarray, values: np.ndarray, shift: Shift, least: _Least
) -> bool:
    """Checks whether a step beside other terms is as large as it must be; none is if the terms hold the step."""
    design = np.stack(terms, axis=1)
    if len(values) <= design.shape[1] + 1:
        return False  # nothing is left over to check it
    alone = step - design @ np.linalg.lstsq(design, step, rcond=None)[0]
    weight = float(alone @ alone)
    if weight < _ROUNDING * len(values):
        return False
    size = np.sign(shift.size) * float(alone @ values) / weight
    return bool(size >= least.floor and size >= least.threshold * least.noise / np.sqrt(weight))


def _checkpoint_noise(shift: Shift, checkpoints: int, *, side: int) -> float:
    """Computes the standard deviation of one checkpoint from a shift's noise, that of two averages' difference."""
    before, after = min(side, shift.gap + 1), min(side, checkpoints - 1 - shift.gap)
    return shift.noise / np.sqrt(1 / before + 1 / after)
