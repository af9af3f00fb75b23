"""Scores level shifts: how much a metric changed at each gap between checkpoints, against its noise.

Pure jitted functions of one run's arrays [checkpoint, metric]. Gap g lies between checkpoints g and g + 1. Axis letters
beside those of `kvjax.model.sites`: M metrics (one trajectory each: a measure on a split, of a component), G gaps, J
bootstrap resamples. Checkpoints may be spaced unevenly: drift and second differences are taken in steps. A missing
value is NaN, and so is every checkpoint that pads a run.
"""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp

# Of a sample's median absolute deviation: to a normal standard deviation, and the share of its observations that a
# variance estimate with the same spread would need.
_MAD_TO_SD = 1.4826
_MAD_EFFICIENCY = 0.37
_MEDIAN_SD = 1.2533  # of a median, in standard deviations of a mean


@dataclasses.dataclass(frozen=True)
class ShiftSettings:
    """The static settings of the scores (docs/birth_windows.md explains each; values come from the window config).

    Attributes:
      side: checkpoints averaged on each side of a gap; fewer at the run's edges.
      min_side: fewest checkpoints on a side for a gap to be scored.
      jump_share: share of a shift that must happen between the gap's own two checkpoints.
      wobble_lags: distances, in checkpoints, over which second differences are taken.
      wobble_radius: checkpoints further away from a gap than this do not count for its wobble.
      prior_weight: weight of the expected wobble, in observations.
      threshold: score at which a shift is taken out of its metric's wobble.
    """

    side: int
    min_side: int
    jump_share: float
    wobble_lags: tuple[int, ...]
    wobble_radius: int
    prior_weight: float
    threshold: float


@chex.dataclass(frozen=True)
class MetricTraits:
    """What is known of each metric before its trajectory is seen.

    Attributes:
      floor: [M] smallest shift that means anything, in the metric's unit.
      wobble: [M] standard deviation from checkpoint to checkpoint to expect.
      direction: [M] +1 if only a rise counts, -1 if only a fall does, 0 for either.
      pooling: [M, M] rows that average over the metrics sharing a wobble (one measure on all splits).
    """

    floor: jax.Array
    wobble: jax.Array
    direction: jax.Array
    pooling: jax.Array


@chex.dataclass(frozen=True)
class ShiftScores:
    """Level shifts of metrics at gaps; NaN if a gap cannot be scored.

    Attributes:
      size: [..., G, M] average after minus average before, less the metric's own steady drift.
      score: [..., G, M] |size| in units of its noise.
      holds: [..., G, M] whether the shift is one: large enough, in the right direction, not a spike, and at this gap.
    """

    size: jax.Array
    score: jax.Array
    holds: jax.Array


@functools.partial(jax.jit, static_argnames="settings")
def shift_scores(
    values_CxM: jax.Array,
    samples_JxCxM: jax.Array,
    steps_C: jax.Array,
    traits: MetricTraits,
    *,
    settings: ShiftSettings,
) -> ShiftScores:
    """Scores every candidate shift of a run, from its trajectories and their paired resamples.

    Args:
      values_CxM: trajectories, maybe padded with NaN at the end.
      samples_JxCxM: the same under resamples of sequences, each resample the same for all checkpoints. A metric
        that has no resamples repeats its values: its noise is its wobble alone.
      steps_C: training steps, ascending also through the padding.
      traits: of the metrics.
      settings: static settings.

    Returns:
      Scores, [G, M] each.
    """
    steps = steps_C.astype(values_CxM.dtype)
    level = values_CxM - (steps - steps[0])[:, None] * steady_drift(values_CxM, steps)[None]
    size, n_before, n_after = level_shifts(level, side=settings.side)
    resampled = jax.vmap(lambda sample: level_shifts(sample, side=settings.side)[0])(samples_JxCxM)
    bootstrap = jnp.nan_to_num(jnp.nanvar(resampled, axis=0))
    per_checkpoint = 1 / jnp.maximum(n_before, 1) + 1 / jnp.maximum(n_after, 1)
    scored = (jnp.minimum(n_before, n_after) >= settings.min_side) & jnp.isfinite(level[1:]) & jnp.isfinite(level[:-1])
    direction = traits.direction[None]
    wanted = (direction == 0) | (jnp.sign(size) == direction)
    holds = scored & wanted & (jnp.abs(size) >= traits.floor[None]) & _separates(level, size, settings)

    def score(shifted: jax.Array, lags: tuple[int, ...]) -> jax.Array:
        seen = dataclasses.replace(settings, wobble_lags=lags)
        wobble = per_checkpoint * wobble_variance(level, steps, shifted, traits, settings=seen)
        # Second differences hold the sampling noise of single checkpoints as well: the two overlap and are not added.
        return jnp.where(scored, jnp.abs(size) / jnp.sqrt(jnp.maximum(bootstrap, wobble)), jnp.nan)

    # One shift must not count as wobble when another is scored. Shifts are therefore found at the shortest lag, which
    # they disturb least, and found again without the first ones.
    shifted = jnp.zeros_like(holds)
    for _ in range(2):
        shifted = holds & (score(shifted, settings.wobble_lags[:1]) >= settings.threshold)
    score_GxM = score(shifted, settings.wobble_lags)
    return ShiftScores(size=jnp.where(scored, size, jnp.nan), score=score_GxM, holds=holds)


def level_shifts(values_CxM: jax.Array, *, side: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Subtracts, at every gap, the average of up to `side` checkpoints before from that of as many after.

    Returns:
      The shifts [G, M], NaN if a side holds no value, and how many values stand before and after, [G, M] each.
    """
    before, after = _sides(values_CxM.shape[0], side)
    there = jnp.isfinite(values_CxM).astype(values_CxM.dtype)
    filled = jnp.where(jnp.isfinite(values_CxM), values_CxM, 0.0)

    def average(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        count = jnp.matmul(weights, there, precision="highest")
        total = jnp.matmul(weights, filled, precision="highest")
        return jnp.where(count > 0, total / jnp.maximum(count, 1.0), jnp.nan), count

    (level_before, n_before), (level_after, n_after) = average(before), average(after)
    return level_after - level_before, n_before, n_after


def steady_drift(values_CxM: jax.Array, steps_C: jax.Array) -> jax.Array:
    """Estimates each metric's steady drift per step, [M]: the median slope, shrunk towards 0 by two standard errors.

    The median slope of a run that stands still, jumps and stands still is about 0; that of a ramp is the ramp's slope.
    The shrinkage keeps noise alone from making a drift.
    """
    slopes = jnp.diff(values_CxM, axis=0) / jnp.diff(steps_C)[:, None]
    count = jnp.isfinite(slopes).sum(axis=0)
    middle = _median(slopes, axis=0)
    spread = _MAD_TO_SD * _median(jnp.abs(slopes - middle[None]), axis=0)
    error = _MEDIAN_SD * spread / jnp.sqrt(jnp.maximum(count, 1))
    # The median of fewer than five slopes may lie inside a transition.
    surely = jnp.sign(middle) * jnp.maximum(jnp.abs(middle) - 2 * error, 0.0)
    return jnp.where(count >= 5, surely, 0.0)


def wobble_variance(
    values_CxM: jax.Array,
    steps_C: jax.Array,
    shifted_GxM: jax.Array,
    traits: MetricTraits,
    *,
    settings: ShiftSettings,
) -> jax.Array:
    """Estimates the variance of each metric from checkpoint to checkpoint as seen from each gap, [G, M].

    1. Take each checkpoint's deviation from the line between its neighbours at a lag, scaled to unit variance for white
       noise.
    2. Keep the deviations near the gap, but neither across it nor across a known shift (`shifted_GxM`).
    3. Square their median absolute value. The expected wobble counts as `prior_weight` more observations, so that few
       checkpoints cannot appear noiseless.
    4. Take the largest over lags and over own and pooled estimate: slow wobble shows at long lags only.
    """
    n = values_CxM.shape[0]
    gaps = jnp.arange(n - 1)
    shifts_until = jnp.pad(jnp.cumsum(shifted_GxM, axis=0), ((1, 0), (0, 0)))  # [C, M]
    prior = traits.wobble[None] ** 2
    largest = jnp.broadcast_to(prior, (n - 1, values_CxM.shape[1]))
    if n < 3:
        return largest
    estimates = []
    for lag in settings.wobble_lags:
        if n <= 2 * lag:
            continue
        left, middle, right = values_CxM[: n - 2 * lag], values_CxM[lag : n - lag], values_CxM[2 * lag :]
        share = ((steps_C[lag : n - lag] - steps_C[: n - 2 * lag]) / (steps_C[2 * lag :] - steps_C[: n - 2 * lag]))[
            :, None
        ]
        scale = jnp.sqrt(1 + share**2 + (1 - share) ** 2)
        deviations = jnp.abs(middle - (1 - share) * left - share * right) / scale
        across_shift = shifts_until[2 * lag :] > shifts_until[: n - 2 * lag]
        deviations = jnp.where(across_shift, jnp.nan, deviations)
        centres = jnp.arange(lag, n - lag)
        from_gap = centres[None] - gaps[:, None]
        across = (from_gap <= lag) & (from_gap > -lag)
        near = jnp.abs(from_gap) <= settings.wobble_radius
        used = near & ~across  # [G, centres]
        of_gap = jnp.where(used[:, :, None], deviations[None], jnp.nan)
        count = _MAD_EFFICIENCY * jnp.isfinite(of_gap).sum(axis=1)
        seen = jnp.where(count > 0, (_MAD_TO_SD * _median(of_gap, axis=1)) ** 2, 0.0)
        weighted = jnp.matmul(count * seen, traits.pooling.T, precision="highest")
        pooled_count = jnp.matmul(count, traits.pooling.T, precision="highest")
        pooled = weighted / jnp.maximum(pooled_count, 1e-9)
        weight = settings.prior_weight
        estimates.append((weight * prior + count * seen) / (weight + count))
        estimates.append((weight * prior + 2 * pooled_count * pooled) / (weight + 2 * pooled_count))
    return functools.reduce(jnp.maximum, estimates) if estimates else largest


def _separates(level_CxM: jax.Array, size_GxM: jax.Array, settings: ShiftSettings) -> jax.Array:
    """Checks whether all values before lie on one side of the middle and all values after on the other, [G, M].

    A spike fails on either flank. So does a gap beside the shift's own, whose near average is a mixture.
    """
    n = level_CxM.shape[0]
    gaps = jnp.arange(n - 1)
    sign = jnp.sign(size_GxM)
    jump = (level_CxM[1:] - level_CxM[:-1]) * sign
    separated = jump >= settings.jump_share * jnp.abs(size_GxM)
    before, _ = _sides(n, settings.side)
    there = jnp.isfinite(level_CxM)
    filled = jnp.where(there, level_CxM, 0.0)
    n_before = jnp.matmul(before, there.astype(level_CxM.dtype), precision="highest")
    mean_before = jnp.matmul(before, filled, precision="highest") / jnp.maximum(n_before, 1)
    middle = mean_before + size_GxM / 2
    for offset in range(min(settings.side, n)):
        for index, side in ((gaps - offset, -1), (gaps + 1 + offset, 1)):
            inside = ((index >= 0) & (index < n))[:, None]
            value = level_CxM[jnp.clip(index, 0, n - 1)]
            right_side = (value - middle) * sign * side > 0
            separated &= right_side | ~inside | ~jnp.isfinite(value)
    return separated


def _median(values: jax.Array, *, axis: int) -> jax.Array:
    """Computes the median of the finite values along an axis; NaN if there is none.

    One sort and two look-ups: `jnp.nanmedian` compiles several times longer.
    """
    finite = jnp.isfinite(values)
    ordered = jnp.sort(jnp.where(finite, values, jnp.inf), axis=axis)
    count = finite.sum(axis=axis, keepdims=True)
    ends = [jnp.take_along_axis(ordered, jnp.maximum(rank, 0), axis=axis) for rank in ((count - 1) // 2, count // 2)]
    return jnp.where(count > 0, (ends[0] + ends[1]) / 2, jnp.nan).squeeze(axis)


def _sides(n: int, side: int) -> tuple[jax.Array, jax.Array]:
    """Marks the checkpoints before and after each gap with 1, the others with 0, [G, C] each."""
    distance = jnp.arange(n)[None] - jnp.arange(n - 1)[:, None]  # 0: the checkpoint just before the gap
    before = (distance <= 0) & (distance > -side)
    after = (distance >= 1) & (distance <= side)
    return before.astype(jnp.float32), after.astype(jnp.float32)
