"""Dates movements of metrics: births by threshold, half-rises, and the course of a movement inside a window.

Source: docs/birth_windows.md. Axis letters as in `kvjax.windows.shift_scores`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.measure.uncertainty import LEVEL

COURSE = ("onset", "midpoint", "completion")
COURSE_SHARES = (0.1, 0.5, 0.9)


@dataclasses.dataclass(frozen=True)
class Birth:
    """The first checkpoint at which a metric reaches its threshold and stays there.

    Attributes:
      index: of the checkpoint; None if there is none so far.
      first_reached: the first checkpoint at or above the threshold, whatever follows; None if there is none.
      open_from: the first of the checkpoints at the end at which the metric is at its threshold, too few to call it a
        birth; None if there are none, or it was born.
    """

    index: int | None
    first_reached: int | None
    open_from: int | None


def birth(values_C: np.ndarray, threshold: float, *, persistence: int) -> Birth:
    """Finds the birth of a metric: it reaches the threshold, and stays there for `persistence` further checkpoints.

    Args:
      values_C: its trajectory; NaN is below any threshold.
      threshold: to be reached.
      persistence: number of further checkpoints, directly after, that must be at or above it as well.
    """
    reached, below = np.flatnonzero(values_C >= threshold), np.flatnonzero(~(values_C >= threshold))
    last_below = int(below[-1]) if len(below) else -1
    (index,) = birth_indices(values_C[None], threshold, persistence=persistence).tolist()
    born = index < len(values_C)
    return Birth(
        index=index if born else None,
        first_reached=int(reached[0]) if len(reached) else None,
        open_from=last_below + 1 if not born and last_below < len(values_C) - 1 else None,
    )


def birth_indices(values_XxC: np.ndarray, threshold: float, *, persistence: int) -> np.ndarray:
    """Finds the checkpoint index of each trajectory's birth, int [X]; C if there is none."""
    n = values_XxC.shape[1]
    at = values_XxC >= threshold
    stays = np.zeros_like(at)
    for c in range(n - persistence):
        stays[:, c] = at[:, c : c + persistence + 1].all(axis=1)
    return np.where(stays.any(axis=1), stays.argmax(axis=1), n)


def half_rise_indices(values_XxC: np.ndarray, *, side: int, floor: float) -> np.ndarray:
    """Finds where each trajectory first reaches halfway from its level before to its plateau, int [X].

    Level and plateau are the averages of the first and last `side` checkpoints of the run. The halfway value acts as a
    threshold fitted to this run. Unlike a birth, a half-rise does not need further checkpoints at that level.

    Returns:
      Checkpoint indices; C if the rise from level to plateau is below `floor`, too small to halve.
    """
    before, after = values_XxC[:, :side].mean(axis=1), values_XxC[:, -side:].mean(axis=1)
    reached = values_XxC >= ((before + after) / 2)[:, None]
    rose = (after - before >= floor) & reached.any(axis=1)
    return np.where(rose, reached.argmax(axis=1), values_XxC.shape[1])


def isotonic_fit(values_C: jax.Array, weights_C: jax.Array) -> jax.Array:
    """Fits the weighted least-squares curve that never falls, [C]; weights may be 0.

    The fit at i is the largest, over starts a <= i, of the smallest, over ends b >= i, average of values a to b.
    Source: Barlow et al., Statistical Inference under Order Restrictions (1972), the max-min formula.
    """
    n = values_C.shape[0]
    weighted = jnp.concatenate([jnp.zeros(1), jnp.cumsum(values_C * weights_C)])
    total = jnp.concatenate([jnp.zeros(1), jnp.cumsum(weights_C)])
    sums = weighted[None, 1:] - weighted[:-1, None]
    weights = total[None, 1:] - total[:-1, None]
    ordered = jnp.arange(n)[None, :] >= jnp.arange(n)[:, None]
    # A stretch without weight must neither lower a minimum nor raise a maximum.
    said = ordered & (weights > 1e-6)
    averages = jnp.where(said, sums / jnp.where(said, weights, 1.0), jnp.inf)
    smallest = jax.lax.cummin(averages, axis=1, reverse=True)
    starts = jnp.where(ordered & jnp.isfinite(smallest), smallest, -jnp.inf)
    return starts.max(axis=0)


def crossing_steps(fit_C: jax.Array, steps_C: jax.Array, inside_C: jax.Array, levels_X: jax.Array) -> jax.Array:
    """Interpolates the step at which a rising curve first reaches each level, [X].

    Args:
      fit_C: the curve.
      steps_C: steps of its points.
      inside_C: bool, the points that count, next to each other.
      levels_X: the levels. A level that the first point has reached already gives that point's step.

    Returns:
      Steps; NaN if the level is not reached.
    """
    n = fit_C.shape[0]
    reached = inside_C[:, None] & (fit_C[:, None] >= levels_X[None])
    index = jnp.argmax(reached, axis=0)
    first = jnp.argmax(inside_C)
    previous = jnp.clip(index - 1, 0, n - 1)
    rise = fit_C[index] - fit_C[previous]
    share = jnp.where(rise > 0, (levels_X - fit_C[previous]) / jnp.where(rise > 0, rise, 1.0), 1.0)
    between = steps_C[previous] + jnp.clip(share, 0.0, 1.0) * (steps_C[index] - steps_C[previous])
    step = jnp.where(index > first, between, steps_C[index])
    return jnp.where(reached.any(axis=0), step, jnp.nan)


@jax.jit
def movement_steps(
    values_XxMxC: jax.Array,
    steps_C: jax.Array,
    signs_M: jax.Array,
    first_M: jax.Array,
    last_M: jax.Array,
    segments_Mx2: jax.Array,
    side: jax.Array,
    skipped: jax.Array,
) -> jax.Array:
    """Dates onset, midpoint and completion of metrics' movements, for a trajectory and all its resamples alike.

    The floor is the average of the `side` checkpoints up to the movement's first gap, the plateau that of as many after
    its last gap; in both the `skipped` ones next to the movement are left out if there are others. An isotonic fit runs
    over these checkpoints and all between them. Onset, midpoint and completion are the steps at which the fit has
    covered 10, 50 and 90 % of the way from floor to plateau.

    Args:
      values_XxMxC: X versions (say, resamples) of M trajectories. NaN is left out of the fit.
      steps_C: training steps.
      signs_M: +1 for a rise, -1 for a fall.
      first_M: first gap of each movement.
      last_M: its last gap.
      segments_Mx2: first and last checkpoint that belong to each movement and to no other of its metric.
      side: checkpoints taken for floor and plateau.
      skipped: those of them next to the movement that are left out of the averages.

    Returns:
      Steps [X, M, 3]; NaN if the plateau is not beyond the floor, or a level is not reached.
    """
    n = values_XxMxC.shape[-1]
    index = jnp.arange(n)

    def one(values_C: jax.Array, sign: jax.Array, first: jax.Array, last: jax.Array, segment: jax.Array) -> jax.Array:
        # Never further than floor and plateau: later checkpoints may undo the movement.
        start = jnp.maximum(jnp.minimum(segment[0], first), first - side + 1)
        end = jnp.minimum(jnp.maximum(segment[1], last + 1), last + side)
        inside = (index >= start) & (index <= end)
        there = jnp.isfinite(values_C)
        rising = jnp.where(there, values_C * sign, 0.0)

        def average(member: jax.Array) -> jax.Array:
            weights = (member & inside & there).astype(rising.dtype)
            return jnp.where(weights.sum() > 0, (rising * weights).sum() / jnp.maximum(weights.sum(), 1), jnp.nan)

        def level(member: jax.Array, far: jax.Array) -> jax.Array:
            return jnp.where((member & far & inside & there).any(), average(member & far), average(member))

        low = level((index <= first) & (index > first - side), index <= first - skipped)
        high = level((index > last) & (index <= last + side), index > last + skipped)
        fit = isotonic_fit(rising, (inside & there).astype(rising.dtype))
        levels = low + jnp.asarray(COURSE_SHARES) * (high - low)
        return jnp.where(high > low, crossing_steps(fit, steps_C, inside, levels), jnp.nan)

    of_metrics = jax.vmap(one)
    return jax.lax.map(lambda values: of_metrics(values, signs_M, first_M, last_M, segments_Mx2), values_XxMxC)


def observed_interval(
    moments_K: np.ndarray, resampled: Sequence[np.ndarray], steps_C: np.ndarray
) -> tuple[int, int] | None:
    """Joins what was observed of a moment with what resampling adds: the checkpoints between which it lies.

    A moment interpolated between two checkpoints was observed to lie between them, no closer. Each resample has its own
    two. The interval reaches from the earlier checkpoint of the estimates, or of the lowest 2.5 % of the resamples, to
    the later one of the estimates, or of the highest 2.5 %.

    Args:
      moments_K: estimates in steps, the first that of the moment, the others with other levels before and after; NaN
        if there is none.
      resampled: [J] each, some of the estimates under resamples; NaN where there is none.
      steps_C: training steps of the checkpoints.

    Returns:
      The two checkpoints; None without a first estimate.
    """
    if not np.isfinite(moments_K[0]):
        return None
    ends = moments_K[np.isfinite(moments_K)].tolist()
    tail = 50 * (1 - LEVEL)
    for samples_J in resampled:
        known = samples_J[np.isfinite(samples_J)]
        if len(known):
            ends += np.percentile(known, [tail, 100 - tail], method="inverted_cdf").tolist()
    return gap_around(min(ends), steps_C)[0], gap_around(max(ends), steps_C)[1]


def gap_around(moment: float, steps_C: np.ndarray) -> tuple[int, int]:
    """Finds the two neighbouring checkpoints around a step; reached at a checkpoint means before it."""
    after = int(np.clip(np.searchsorted(steps_C, moment, side="left"), 1, len(steps_C) - 1))
    return int(steps_C[after - 1]), int(steps_C[after])


@dataclasses.dataclass(frozen=True)
class Precedence:
    """How often one midpoint comes before another over joint resamples.

    Attributes:
      probability: that it does; the undetermined ones count half each way.
      undetermined: share of resamples in which both lie between the same two checkpoints.
    """

    probability: float
    undetermined: float


def precedence(first_J: np.ndarray, second_J: np.ndarray, steps_C: np.ndarray) -> Precedence | None:
    """Compares the midpoints of two metrics over joint resamples.

    The order of midpoints between the same two checkpoints was not observed, and interpolation does not change that.

    Args:
      first_J: midpoints of the one metric, in steps.
      second_J: of the other, under the same resamples.
      steps_C: training steps of the checkpoints.

    Returns:
      The comparison; None if no resample has both.
    """
    both = np.isfinite(first_J) & np.isfinite(second_J)
    if not both.any():
        return None
    # Reached at a checkpoint means reached in the gap that ends there.
    gaps = [np.searchsorted(steps_C, values[both], side="left") for values in (first_J, second_J)]
    same = float((gaps[0] == gaps[1]).mean())
    return Precedence(probability=float((gaps[0] < gaps[1]).mean()) + same / 2, undetermined=same)
