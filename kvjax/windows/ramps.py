"""Tells steady growth from jumps: ramps of metrics, and shifts that are samples of one.

Source: docs/birth_windows.md, "Ramps". Axis letters as in `kvjax.windows.shift_scores`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from kvjax.windows.group_shifts import Shift

# A flank of a shift needs so many checkpoints to show a rate, and a ramp so many gaps.
_FEWEST_IN_FLANK = 7
_SHORTEST_RAMP = 8
# No more of a ramp than this happens within `side` neighbouring gaps.
_LARGEST_PART = 0.5
# Of its size at either end, or two standard errors: so little is no growth yet, or no more.
_END_SHARE = 0.05


@dataclasses.dataclass(frozen=True)
class Ramp:
    """Steady growth of a metric over many checkpoints.

    Attributes:
      metric: index of the metric.
      first: index of the checkpoint at which it begins.
      last: index of the checkpoint at which it ends.
      before: level around its beginning, in the metric's unit.
      after: level around its end.
      score: its size in standard errors.
    """

    metric: int
    first: int
    last: int
    before: float
    after: float
    score: float


def is_growth(
    shift: Shift, values_C: np.ndarray, steps_C: np.ndarray, *, floor: float, threshold: float, side: int
) -> bool:
    """Checks whether a shift is a sample of growth that goes on beside it.

    The rate of growth is the median slope between checkpoints of each flank, averaged over both. A flank has twice
    `side` checkpoints beside those at which the shift holds, or as many as these are. A flank that moves the other way,
    or is too short, has the rate 0. The shift is growth if what it exceeds that rate by is below its floor or the
    threshold.

    Args:
      shift: of the metric.
      values_C: the metric's trajectory.
      steps_C: training steps.
      floor: smallest shift that means anything.
      threshold: score to reach.
      side: checkpoints averaged on each side of a gap.
    """
    length = max(2 * side, shift.last - shift.first + 1)
    flanks = (slice(max(0, shift.first - length), shift.first + 1), slice(shift.last + 1, shift.last + 2 + length))
    sign = np.sign(shift.size)
    rate = np.mean([max(0.0, sign * _median_slope(values_C[flank], steps_C[flank])) for flank in flanks])
    before, after = steps_C[max(0, shift.gap - side + 1) : shift.gap + 1], steps_C[shift.gap + 1 : shift.gap + 1 + side]
    beyond = abs(shift.size) - rate * (after.mean() - before.mean())
    return bool(beyond < floor or beyond < threshold * shift.noise)


def find_ramps(
    values_CxM: np.ndarray,
    noise_M: np.ndarray,
    floor_M: np.ndarray,
    jumps: Sequence[Shift],
    *,
    threshold: float,
    alone: float,
    corroboration: int,
    side: int,
) -> list[Ramp]:
    """Finds the stretches over which metrics grow or shrink steadily, in order of metric and step.

    Averages of `side` checkpoints are compared over 8 gaps, 16, 32 and so on. A stretch is a ramp if they differ by
    twice the floor and reach the threshold, no `side` neighbouring gaps hold more than half of that, and no jump of the
    metric lies in it. Overlapping stretches in one direction are one ramp. As windows do, ramps need others that
    overlap, or a high score alone.

    Args:
      values_CxM: the trajectories.
      noise_M: standard error of a difference of two such averages; NaN for metrics that are left out.
      floor_M: smallest shift that means anything.
      jumps: shifts of the run that are no growth.
      threshold: score to reach.
      alone: score that suffices for a single metric.
      corroboration: number of metrics that must grow together.
      side: checkpoints averaged.
    """
    n = len(values_CxM)
    ramps = []
    for metric in np.flatnonzero(np.isfinite(noise_M)).tolist():
        values = values_CxM[:, metric]
        smooth = np.convolve(values, np.full(side, 1 / side), mode="valid")  # [n - side + 1], NaN near missing values
        least = max(2 * floor_M[metric], threshold * noise_M[metric])
        covered = np.zeros((2, n - 1), bool)  # gaps in ramps upwards and downwards
        gaps = _SHORTEST_RAMP
        while gaps <= len(smooth) - 1:
            for begin in np.flatnonzero(np.abs(smooth[gaps:] - smooth[:-gaps]) >= least).tolist():
                end = begin + gaps + side - 1
                size = smooth[begin + gaps] - smooth[begin]
                parts = np.abs(values[begin + side : end + 1] - values[begin : end + 1 - side])
                jumped = any(jump.metric == metric and begin <= jump.gap < end for jump in jumps)
                if not jumped and (parts <= _LARGEST_PART * abs(size)).all():
                    covered[int(size < 0), begin:end] = True
            gaps *= 2
        for of_sign in covered:
            for stretch in _stretches(of_sign):
                first, last = _growing(smooth, *stretch, noise=noise_M[metric], side=side)
                ends = np.clip([first - side // 2, last - side // 2], 0, len(smooth) - 1)
                before, after = smooth[ends].tolist()
                score = abs(after - before) / noise_M[metric]
                ramps.append(Ramp(metric, first, last, before, after, float(score)))
    supported = [
        ramp
        for ramp in ramps
        if ramp.score >= alone
        or len({other.metric for other in ramps if min(ramp.last, other.last) > max(ramp.first, other.first)})
        >= corroboration
    ]
    return sorted(supported, key=lambda ramp: (ramp.metric, ramp.first))


def _stretches(of_gaps: np.ndarray) -> list[tuple[int, int]]:
    """Lists the first and last checkpoint of every run of marked gaps."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], of_gaps.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _growing(smooth: np.ndarray, first: int, last: int, *, noise: float, side: int) -> tuple[int, int]:
    """Cuts what stands still from both ends of a stretch of checkpoints; `smooth` averages `side` of them."""
    inside = smooth[first : last - side + 2]
    size = inside[-1] - inside[0]
    little, sign = max(2 * noise, _END_SHARE * abs(size)), np.sign(size)
    left = np.flatnonzero(sign * (inside - inside[0]) > little)
    arriving = np.flatnonzero(sign * (inside[-1] - inside) > little)
    if not len(left) or not len(arriving):
        return first, last
    middle = side // 2
    return first + max(0, left[0] - 1 + middle), first + min(arriving[-1] + 1 + middle, last - first)


def _median_slope(values: np.ndarray, steps: np.ndarray) -> float:
    """Computes the median slope over all pairs of points (Theil and Sen); 0 if there are too few points."""
    there = np.isfinite(values)
    if there.sum() < _FEWEST_IN_FLANK:
        return 0.0
    first, second = np.triu_indices(int(there.sum()), k=1)
    known, at = values[there], steps[there].astype(float)
    return float(np.median((known[second] - known[first]) / (at[second] - at[first])))
