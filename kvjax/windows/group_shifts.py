"""Groups significant level shifts of a run into windows and finds how far each window reaches."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from scipy.special import ndtri

# Shifts are one movement if the metric goes on at this share of the faster one's rate per step.
_RATE_SHARE = 0.2
_SMOOTH = 1  # checkpoints on each side of a gap over which that rate is averaged


@dataclasses.dataclass(frozen=True)
class DetectionSettings:
    """When scores make a window (docs/birth_windows.md explains each; values come from the window config).

    Attributes:
      threshold: score that each of `corroboration` metrics must reach.
      threshold_alone: score that suffices for a single metric.
      corroboration: number of metrics that must move together.
      similar_support: share of the larger group's support that the smaller needs for both to be one window.
      calibrated_tests: number of (gap, metric) pairs the thresholds were calibrated for; more raise them.
    """

    threshold: float
    threshold_alone: float
    corroboration: int
    similar_support: float
    calibrated_tests: int


@dataclasses.dataclass(frozen=True)
class Shift:
    """One metric's level shift: neighbouring gaps at which it holds, in one direction.

    Attributes:
      metric: index of the metric.
      gap: where its size is largest; gap g lies between checkpoints g and g + 1.
      first: first gap at which it holds.
      last: last such gap.
      size: at `gap`, in the metric's unit.
      score: at `gap`, in its noise.
      relative: |size| over the range of the metric in the run.
    """

    metric: int
    gap: int
    first: int
    last: int
    size: float
    score: float
    relative: float

    @property
    def noise(self) -> float:
        """Standard error of its size."""
        return abs(self.size) / self.score


@dataclasses.dataclass(frozen=True)
class Window:
    """A stretch of checkpoints in which metrics moved together.

    Attributes:
      gap: the gap of the largest shift.
      first: index of its first checkpoint.
      last: index of its last checkpoint.
      shifts: what moved there, the largest score first.
    """

    gap: int
    first: int
    last: int
    shifts: tuple[Shift, ...]


def scaled_thresholds(num_tests: int, settings: DetectionSettings) -> tuple[float, float]:
    """Raises the thresholds (together, alone) for a run with more (gap, metric) pairs than they were calibrated for.

    Both grow as a normal quantile does at Bonferroni's level. Fewer pairs do not lower them: with few checkpoints the
    noise is less known.
    """
    ratio = 1.0
    if num_tests > settings.calibrated_tests:
        ratio = ndtri(0.025 / num_tests) / ndtri(0.025 / settings.calibrated_tests)
    return settings.threshold * ratio, settings.threshold_alone * ratio


def find_shifts(
    size_GxM: np.ndarray, score_GxM: np.ndarray, holds_GxM: np.ndarray, range_M: np.ndarray, *, threshold: float
) -> list[Shift]:
    """Finds every shift that holds and reaches the threshold: one per metric and run of neighbouring gaps.

    Args:
      size_GxM: sizes, NaN if a gap cannot be scored.
      score_GxM: scores.
      holds_GxM: whether the shift at a gap holds.
      range_M: largest minus smallest value of each metric in the run.
      threshold: score to reach.
    """
    found = []
    significant = holds_GxM & (np.nan_to_num(score_GxM) >= threshold)
    for metric in np.flatnonzero(significant.any(axis=0)).tolist():
        gaps = np.flatnonzero(significant[:, metric])
        signs = np.sign(size_GxM[gaps, metric])
        breaks = np.flatnonzero((np.diff(gaps) > 1) | (np.diff(signs) != 0)) + 1
        for group in np.split(gaps, breaks):
            gap = int(group[np.argmax(np.abs(size_GxM[group, metric]))])
            size = float(size_GxM[gap, metric])
            spread = float(range_M[metric])
            found.append(
                Shift(
                    metric=metric,
                    gap=gap,
                    first=int(group[0]),
                    last=int(group[-1]),
                    size=size,
                    score=float(score_GxM[gap, metric]),
                    relative=min(abs(size) / spread, 1.0),
                )
            )
    return found


def whole_movements(shifts: Sequence[Shift], values_CxM: np.ndarray, steps_C: np.ndarray) -> list[Shift]:
    """Joins shifts of a metric that are parts of one movement.

    On a dense run wobble keeps some gaps of a long movement from holding, so that it falls into several shifts. Two
    neighbouring ones in one direction are one movement if the metric moves from the one to the other at a fifth of the
    faster one's rate per step at least, a standard error allowed.

    Args:
      shifts: from `find_shifts`.
      values_CxM: the trajectories.
      steps_C: training steps.

    Returns:
      A shift for each, in the same order: the joined one that it is part of, or itself.
    """

    def rate(shift: Shift) -> float:
        # The rise in the gap itself, less what noise alone may make of it; on a dense run the smoother one counts.
        values, gap = values_CxM[:, shift.metric], shift.gap
        jump = abs(values[gap + 1] - values[gap]) - 2 * shift.noise
        few = min(_SMOOTH, gap, len(steps_C) - gap - 2)
        slope = abs(values[gap + 1 + few] - values[gap - few]) / (steps_C[gap + 1 + few] - steps_C[gap - few])
        return float(np.nanmax([slope, jump / (steps_C[gap + 1] - steps_C[gap])]))

    def continues(earlier: Shift, later: Shift) -> bool:
        begin, end = earlier.last + 1, later.first
        moved = np.sign(later.size) * (values_CxM[end, later.metric] - values_CxM[begin, later.metric])
        slowest = _RATE_SHARE * max(rate(earlier), rate(later)) * (steps_C[end] - steps_C[begin])
        same = bool(earlier.size * later.size > 0)
        return same and bool(moved + max(earlier.noise, later.noise) >= slowest)

    whole: dict[Shift, Shift] = {}
    parts: list[Shift] = []

    def join() -> None:
        if parts:
            largest = max(parts, key=lambda part: abs(part.size))
            movement = dataclasses.replace(largest, first=parts[0].first, last=parts[-1].last)
            whole.update(dict.fromkeys(parts, movement))
            parts.clear()

    for shift in sorted(shifts, key=lambda shift: (shift.metric, shift.gap)):
        if parts and not (parts[-1].metric == shift.metric and continues(parts[-1], shift)):
            join()
        parts.append(shift)
    join()
    return [whole[shift] for shift in shifts]


def find_windows(
    shifts: Sequence[Shift],
    courses: np.ndarray,
    kinds: Sequence[str],
    opens: Sequence[bool],
    *,
    origins: Mapping[Shift, Shift],
    growing: Collection[Shift],
    steps: np.ndarray,
    num_tests: int,
    settings: DetectionSettings,
) -> list[Window]:
    """Finds the windows of a run, in order; none if no shifts are strong enough together.

    Greedily picks the gap with the largest total shift (each metric kind counted once), assigns it all shifts within
    one gap, and repeats on the rest. Two groups of similar weight become one window if enough metrics move at every
    gap between them. A group that leads up to a much larger movement stays a window of its own.

    A window reaches from the checkpoint at which its fastest metric leaves its floor to the one at which that metric
    reaches its plateau. It has at least one checkpoint on each side of its centre.

    Args:
      shifts: from `find_shifts`.
      courses: [shifts, 2] the steps at which each leaves its floor and reaches its plateau; NaN if unknown.
      kinds: kind of each metric; a kind counts once per gap, however many splits it has.
      opens: whether each metric can open a window; one that cannot may still join one.
      origins: the shift that each repeats, or itself (`kvjax.windows.disguises`). One and its repetitions count once.
      growing: shifts that growth explains as well (`kvjax.windows.growth`). They found no window, and may join one.
      steps: [C] training steps.
      num_tests: number of (gap, metric) pairs scored.
      settings: thresholds.
    """
    together, alone = scaled_thresholds(num_tests, settings)
    course_of = dict(zip(shifts, courses, strict=True))
    groups = []
    left = [shift for shift in shifts if opens[shift.metric]]
    kind_of = {shift: kinds[origins[shift].metric] for shift in left}
    moving = np.zeros(len(steps) - 1, int)
    for shift in left:
        if origins[shift] is shift:
            moving[shift.first : shift.last + 1] += 1
    while left:
        gap = _busiest_gap(left, kind_of)
        near = [shift for shift in left if abs(shift.gap - gap) <= 1]
        left = [shift for shift in left if abs(shift.gap - gap) > 1]
        jumps = [shift for shift in near if shift not in growing]
        strong = len({origins[shift] for shift in jumps if shift.score >= together})
        if strong >= settings.corroboration or any(shift.score >= alone for shift in jumps):
            groups.append(Window(gap, *_extent(gap, near, course_of, steps), tuple(near)))
    windows: list[Window] = []
    for group in sorted(groups, key=lambda group: group.gap):
        if windows and _are_one(windows[-1], group, moving, kind_of, settings):
            group = _joined(windows.pop(), group, kind_of)
        windows.append(group)
    windows = _apart(windows, kind_of)
    joining = [shift for shift in shifts if not opens[shift.metric]]
    return [_with(window, [s for s in joining if window.first <= s.gap < window.last]) for window in windows]


def _support(shifts: Sequence[Shift], kind_of: Mapping[Shift, str]) -> dict[int, float]:
    """Sums, for each gap, the largest relative shift of each kind of metric there; a repetition is of its origin's."""
    largest: dict[tuple[int, str], float] = {}
    for shift in shifts:
        key = (shift.gap, kind_of[shift])
        largest[key] = max(largest.get(key, 0.0), shift.relative)
    support: dict[int, float] = {}
    for (gap, _), relative in largest.items():
        support[gap] = support.get(gap, 0.0) + relative
    return support


def _busiest_gap(shifts: Sequence[Shift], kind_of: Mapping[Shift, str]) -> int:
    """Finds the gap with the largest support; the first of equal ones."""
    support = _support(shifts, kind_of)
    return min(support, key=lambda gap: (-support[gap], gap))


def _are_one(
    earlier: Window, later: Window, moving_G: np.ndarray, kind_of: Mapping[Shift, str], settings: DetectionSettings
) -> bool:
    unbroken = (moving_G[earlier.gap + 1 : later.gap] >= settings.corroboration).all()
    weights = sorted(max(_support(group.shifts, kind_of).values()) for group in (earlier, later))
    return bool(unbroken) and weights[0] >= settings.similar_support * weights[1]


def _apart(windows: Sequence[Window], kind_of: Mapping[Shift, str]) -> list[Window]:
    """Cuts the lighter of two overlapping windows at the beginning or end of the other.

    It always keeps one checkpoint on each side of its centre.
    """
    apart = list(windows)
    for i in range(len(apart) - 1):
        earlier, later = apart[i], apart[i + 1]
        weights = [max(_support(window.shifts, kind_of).values()) for window in (earlier, later)]
        if weights[0] < weights[1]:
            last = min(earlier.last, max(later.first, earlier.gap + 2))
            apart[i] = dataclasses.replace(earlier, last=last)
        else:
            first = max(later.first, min(earlier.last, later.gap))
            apart[i + 1] = dataclasses.replace(later, first=first)
    return apart


def _joined(earlier: Window, later: Window, kind_of: Mapping[Shift, str]) -> Window:
    shifts = (*earlier.shifts, *later.shifts)
    gap = _busiest_gap(shifts, kind_of)
    return Window(gap, min(earlier.first, later.first), max(earlier.last, later.last), shifts)


def _with(window: Window, more: Sequence[Shift]) -> Window:
    shifts = sorted([*window.shifts, *more], key=lambda shift: (-shift.score, shift.metric))
    return dataclasses.replace(window, shifts=tuple(shifts))


def _extent(
    gap: int, shifts: Sequence[Shift], course_of: Mapping[Shift, np.ndarray], steps: np.ndarray
) -> tuple[int, int]:
    """Finds the first and last checkpoint of the stretch over which the fastest metric moved.

    The fastest metric has the largest relative shift of those that hold at the gap itself.
    """
    at_gap = [shift for shift in shifts if shift.first <= gap <= shift.last] or list(shifts)
    fastest = max(at_gap, key=lambda shift: (shift.relative, shift.score))
    onset, completion = course_of[fastest]
    first, last = fastest.first, fastest.last + 1
    if np.isfinite(onset):
        first = int(np.searchsorted(steps, onset, side="right")) - 1
    if np.isfinite(completion):
        last = int(np.searchsorted(steps, completion, side="left"))
    return max(min(first, gap), 0), min(max(last, gap + 2), len(steps) - 1)
