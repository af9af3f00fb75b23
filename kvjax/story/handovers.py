"""Finds where one set of components hands the behaviour to another (docs/definitions.md, "Phases and handovers").

Axis letters: C checkpoints, X components, J resamples. Checkpoints are indices; the caller knows their steps.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Sequence

import numpy as np

from kvjax.measure.uncertainty import LEVEL, percentile_interval
from kvjax.story.shares import Shares

# A component that hands over loses at least this part of its peak share.
LOST = 1 / 3
# One that takes over multiplies its share by at least this.
GAINED = 2.0
# Whoever hands over has carried at this many checkpoints between the windows: at one alone it may be a spike.
_FEWEST_CARRIED = 2


@dataclasses.dataclass(frozen=True)
class Span:
    """A window as indices of checkpoints, or an end of the trajectory.

    Attributes:
      first: its first checkpoint.
      center: the first checkpoint after its largest shift.
      last: its last checkpoint.
      window: its place among the windows of the run; None for an end of the trajectory.
    """

    first: int
    center: int
    last: int
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class Movement:
    """How the share of one component moved.

    Attributes:
      component: its index.
      begins: the checkpoint of the share before: its own peak if it hands over, that of the leader of those who hand
        over if it takes over.
      before: the share there.
      after: the mean share after the later window.
      change: the interval of `after` - `before`.
      gap: the movement is halfway between this checkpoint and the next.
      midpoint: the step at which it is halfway, on the line between them.
      interval: two checkpoints: the midpoint lies between them, whichever sequences are drawn.
      held_from: the first checkpoint from which on the component has handed or taken over.
      further: later checkpoints at which that is seen as well, `persistence` at most.
    """

    component: int
    begins: int
    before: float
    after: float
    change: tuple[float, float]
    gap: int
    midpoint: float
    interval: tuple[int, int]
    held_from: int
    further: int


@dataclasses.dataclass(frozen=True)
class Handover:
    """One set of components hands the behaviour to another.

    Attributes:
      earlier, later: the windows between which it happens.
      lost: of those who hand over, the largest loss first.
      gained: of those who take over, the largest gain first.
      before: the checkpoint at which the leader of those who hand over peaks.
      after: the last checkpoint of the later window, and further ones.
      support: share of the resamples in which all conditions hold at once.
      persisted: whether all of it was seen to hold for `persistence` further checkpoints; else the trajectory ends.
    """

    earlier: Span
    later: Span
    lost: tuple[Movement, ...]
    gained: tuple[Movement, ...]
    before: int
    after: np.ndarray
    support: float
    persisted: bool

    @property
    def between(self) -> tuple[int, int]:
        """The checkpoints that the midpoints of all movements lie between."""
        gaps = [movement.gap for movement in (*self.lost, *self.gained)]
        return min(gaps), max(gaps) + 1


def find_handovers(
    shares: Shares,
    steps: np.ndarray,
    windows: Sequence[Span],
    *,
    persistence: int,
    jumps: Collection[int] = (),
    resumed: Collection[int] = (),
) -> list[Handover]:
    """Finds every handover between two windows, in order.

    The ends of the trajectory count as windows too: what carries the behaviour at the first checkpoint formed before
    it, and a slow rise has no window. Of two pairs of windows that enclose the same handover, the closer one counts.

    Args:
      shares: of the components.
      steps: [C] training steps.
      windows: of the run, in order.
      persistence: further checkpoints at which it must hold, unless the trajectory ends before.
      jumps: gaps across which a run becomes another one. No handover reaches across.
      resumed: gaps inside which training was resumed. No movement is dated there.
    """
    found: list[Handover] = []
    values, samples = _carried_on(shares.shares_CxX), _carried_on(shares.samples_JxCxX)
    ends = sorted({-1, *jumps, len(steps) - 1})
    for begin, last in itertools.pairwise(ends):
        spans = _with_ends(windows, begin + 1, last, persistence)
        pairs = [(i, j) for i in range(len(spans)) for j in range(i + 1, len(spans))]
        for i, j in sorted(pairs, key=lambda pair: (pair[1] - pair[0], pair[0])):
            seen = min(spans[j].last + persistence, last)
            if any(spans[i].center <= h.earlier.center and h.between[1] <= seen for h in found):
                continue
            handover = _between(shares, values, samples, steps, spans[i], spans[j], last=last, persistence=persistence)
            if handover is not None and not any(m.gap in resumed for m in (*handover.lost, *handover.gained)):
                found.append(handover)
    return sorted(found, key=lambda h: (h.between, h.before))


def _with_ends(windows: Sequence[Span], first: int, last: int, persistence: int) -> list[Span]:
    """Lists the windows of one trajectory between its two ends."""
    inside = [window for window in windows if first <= window.first and window.last <= last]
    end = max(last - persistence, first)
    return [Span(first, first, first), *inside, Span(end, end, end)]


def _between(
    shares: Shares,
    values: np.ndarray,
    samples: np.ndarray,
    steps: np.ndarray,
    earlier: Span,
    later: Span,
    *,
    last: int,
    persistence: int,
) -> Handover | None:
    """Finds the largest sets between which the behaviour is handed over from one window to another, if any."""
    before = [c for c in range(earlier.center, later.first + 1) if shares.carried_C[c]]
    after = np.arange(later.last, min(later.last + persistence, last) + 1)
    if not before or after[0] <= before[0] or not shares.carried_C[after].all():
        return None
    peaks = {x: max(before, key=lambda c, x=x: (values[c, x], -c)) for x in range(values.shape[1])}
    at_after = values[after]

    def moved(x: int, begins: int) -> tuple[float, float]:
        changes = samples[:, after, x].mean(axis=1) - samples[:, begins, x]
        low, high = percentile_interval(changes[:, None])
        return float(low[0]), float(high[0])

    def gains(x: int, base: int) -> bool:
        enough = (at_after[:, x] >= GAINED * values[base, x]).all() and moved(x, base)[0] > 0
        return bool(enough) and _gained(samples, x, base, after).mean() >= LEVEL

    lost = [
        x
        for x, peak in peaks.items()
        if np.count_nonzero(shares.carrier_CxX[before, x]) >= _FEWEST_CARRIED
        and (at_after[:, x] <= (1 - LOST) * values[peak, x]).all()
        and moved(x, peak)[1] < 0
        and _lost(samples, x, peak, after).mean() >= LEVEL
    ]
    if not lost:
        return None
    # Whoever stays above all successors hands nothing over to them.
    base = peaks[max(lost, key=lambda x: (values[peaks[x], x], -x))]
    gained = [
        x for x in range(values.shape[1]) if x not in lost and shares.carrier_CxX[after[-1], x] and gains(x, base)
    ]
    lost = [x for x in lost if any((at_after[:, b] > at_after[:, x]).all() for b in gained)]
    gained = [b for b in gained if all((at_after[:, b] > at_after[:, x]).all() for x in lost)]
    if not lost or not gained:
        return None
    base = peaks[max(lost, key=lambda x: (values[peaks[x], x], -x))]
    gained = [b for b in gained if gains(b, base)]  # the leader may be another one now
    if not gained:
        return None

    span = np.arange(base, after[-1] + 1)
    highest = values[:, lost].max(axis=1)
    handed = {x: values[span, x] <= (1 - LOST) * values[peaks[x], x] for x in lost}
    taken = {b: (values[span, b] >= GAINED * values[base, b]) & (values[span, b] > highest[span]) for b in gained}

    def movement(x: int, begins: int, holds: np.ndarray) -> Movement:
        gap, midpoint, interval = _midpoint(values[:, x], samples[:, :, x], begins, after, steps)
        held_from = int(span[_last_run(holds)])
        before_share, after_share = float(values[begins, x]), float(at_after[:, x].mean())
        further = min(int(after[-1]) - held_from, persistence)
        change = moved(x, begins)
        return Movement(x, begins, before_share, after_share, change, gap, midpoint, interval, held_from, further)

    losing = [movement(x, peaks[x], handed[x]) for x in lost]
    gaining = [movement(b, base, taken[b]) for b in gained]
    # One checkpoint alone may be a spike.
    if not any(m.further for m in losing) or not any(m.further for m in gaining):
        return None
    return Handover(
        earlier,
        later,
        tuple(sorted(losing, key=lambda m: (m.after - m.before, m.component))),
        tuple(sorted(gaining, key=lambda m: (m.before - m.after, m.component))),
        before=base,
        after=after,
        support=_support(samples, losing, gaining, after),
        persisted=all(m.further >= persistence for m in (*losing, *gaining)),
    )


def _carried_on(values: np.ndarray) -> np.ndarray:
    """Gives a checkpoint without carriers the shares of the last one that has some, along the axis C of [..., C, X]."""
    filled = values.copy()
    for c in range(1, filled.shape[-2]):
        missing = np.isnan(filled[..., c, :])
        filled[..., c, :] = np.where(missing, filled[..., c - 1, :], filled[..., c, :])
    return filled


def _last_run(holds: np.ndarray) -> int:
    """Finds where the run of true values begins that lasts to the end."""
    false = np.flatnonzero(~holds)
    return int(false[-1]) + 1 if len(false) else 0


def _midpoint(
    values_C: np.ndarray, samples_JxC: np.ndarray, begins: int, after: np.ndarray, steps: np.ndarray
) -> tuple[int, float, tuple[int, int]]:
    """Dates a movement: where its share is halfway for the last time before the checkpoints after it.

    Returns:
      The gap, the interpolated step, and the two checkpoints that bound it: those around it, joined with the 2.5 and
      97.5 % quantiles of those around the midpoints of the resamples.
    """
    (gap,), (weight,) = _crossings(values_C[None], begins, after)
    midpoint = float(steps[gap] + weight * (steps[gap + 1] - steps[gap]))
    gaps, _ = _crossings(samples_JxC, begins, after)
    low = int(np.percentile(gaps, 2.5, method="lower"))
    high = int(np.percentile(gaps, 97.5, method="higher")) + 1
    return int(gap), midpoint, (min(low, int(gap)), max(high, int(gap) + 1))


def _crossings(values_JxC: np.ndarray, begins: int, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the last gap before `after` in which each trajectory crosses halfway, and how far into the gap it does."""
    start, end = values_JxC[:, begins], values_JxC[:, after].mean(axis=1)
    rest = values_JxC[:, begins : after[0] + 1]
    sign = np.where(end < start, -1.0, 1.0)[:, None]
    below = sign * rest < sign * ((start + end) / 2)[:, None]
    below[:, 0] = True  # it begins there by definition
    gaps = below.shape[1] - 1 - np.argmax(below[:, ::-1], axis=1)
    gaps = np.minimum(gaps, below.shape[1] - 2)
    rows = np.arange(len(rest))
    left, right = rest[rows, gaps], rest[rows, gaps + 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        weights = ((start + end) / 2 - left) / (right - left)
    return gaps + begins, np.clip(np.nan_to_num(weights, nan=0.5), 0.0, 1.0)


def _lost(samples: np.ndarray, x: int, peak: int, after: np.ndarray) -> np.ndarray:
    """Checks in which resamples a component loses enough at every checkpoint after, bool [J]."""
    return (samples[:, after, x] <= (1 - LOST) * samples[:, peak, x, None]).all(axis=1)


def _gained(samples: np.ndarray, x: int, base: int, after: np.ndarray) -> np.ndarray:
    """Checks in which resamples a component gains enough at every checkpoint after, bool [J]."""
    return (samples[:, after, x] >= GAINED * samples[:, base, x, None]).all(axis=1)


def _support(samples: np.ndarray, losing: Sequence[Movement], gaining: Sequence[Movement], after: np.ndarray) -> float:
    """Computes the share of resamples in which all conditions hold at once."""
    holds = np.ones(len(samples), bool)
    highest = samples[:, after][:, :, [m.component for m in losing]].max(axis=2)
    for m in losing:
        holds &= _lost(samples, m.component, m.begins, after)
    for m in gaining:
        holds &= _gained(samples, m.component, m.begins, after)
        holds &= (samples[:, after, m.component] > highest).all(axis=1)
    return float(holds.mean())
