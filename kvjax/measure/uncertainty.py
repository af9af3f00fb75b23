"""Intervals: a bootstrap over sequences, paired across checkpoints and stratified by split (docs/definitions.md).

Reads of one sequence share its writes and their answers may be copied from each other, so sequences are resampled, not
reads. One set of resamples serves all checkpoints of a run: changes between checkpoints, and the order in which metrics
move, are then compared within each resample. Everything is made from per-sequence sums; no forward pass is repeated.
"""

from __future__ import annotations

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np

RESAMPLES = 1000
LEVEL = 0.95

_CHUNK = 512  # statistics resampled at once: [resamples, chunk] floats


def resample_counts(splits_N: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Returns how often each sequence is drawn in each resample, float32 [K, N].

    Within every split as many sequences are drawn, with replacement, as it has. Drawn by NumPy, so that a seed means
    the same resamples on every device.

    Args:
      splits_N: the split of each sequence, any integers.
      resamples: K.
      seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    counts = np.zeros((resamples, len(splits_N)), np.float32)
    for split in np.unique(splits_N):
        members = np.flatnonzero(splits_N == split)
        counts[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=resamples)
    return counts


def bootstrap_ratios(counts_KxN: np.ndarray, sums_NxX: np.ndarray, totals_NxX: np.ndarray) -> np.ndarray:
    """Returns resampled ratios of sums, float32 [K, X]: of rates, means per read, or differences of either.

    Args:
      counts_KxN: from `resample_counts`.
      sums_NxX: per sequence, what the ratio sums, for each of X statistics.
      totals_NxX: per sequence, what it is divided by (reads, or reads where the statistic exists).

    Returns:
      sum(counts * sums) / sum(counts * totals); NaN where a resample holds no read that counts.
    """
    statistics = sums_NxX.shape[1]
    # Filled up to whole chunks, so that any number of statistics is one program.
    filling = ((0, 0), (0, -statistics % _CHUNK))
    sums, totals = (np.pad(np.asarray(x, np.float32), filling) for x in (sums_NxX, totals_NxX))
    counts = jnp.asarray(counts_KxN)
    chunks = range(0, sums.shape[1], _CHUNK)
    ratios = [_ratios(counts, sums[:, i : i + _CHUNK], totals[:, i : i + _CHUNK]) for i in chunks]
    return np.concatenate([np.asarray(x) for x in ratios], axis=1)[:, :statistics]


def resampled_ratios(
    counts_KxN: np.ndarray, sums_CxNxX: np.ndarray, totals_CxNxX: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ratios of sums over sequences, [C, *X], NaN where nothing counts, and those of resamples, [K, C, *X].

    Args:
      counts_KxN: from `resample_counts`.
      sums_CxNxX: per sequence, what the ratios sum, at each checkpoint.
      totals_CxNxX: per sequence, what they are divided by.
    """
    shape = (len(sums_CxNxX), *sums_CxNxX.shape[2:])

    def by_sequence(x: np.ndarray) -> np.ndarray:
        return np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)

    totals = totals_CxNxX.sum(axis=1, dtype=np.float64)
    sums = sums_CxNxX.sum(axis=1, dtype=np.float64)
    values = np.divide(sums, totals, out=np.full(shape, np.nan), where=totals != 0)
    samples = bootstrap_ratios(counts_KxN, by_sequence(sums_CxNxX), by_sequence(totals_CxNxX))
    return values, samples.reshape(-1, *shape)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The least and the largest value that a rate, or a difference of rates, can have."""

    low: float
    high: float


RATE = Bounds(0.0, 1.0)
DIFFERENCE_OF_RATES = Bounds(-1.0, 1.0)


def interval(
    values_X: np.ndarray, samples_KxX: np.ndarray, num_sequences: int, *, bounds: Bounds | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ends of the 95 % interval of X statistics, from their resamples.

    Args:
      values_X: the statistics.
      samples_KxX: under K resamples of sequences.
      num_sequences: how many sequences were resampled.
      bounds: of a rate or a difference of rates. Where all resamples of one agree, as they do for rates of 0 and 1,
        they say nothing of how rare the other outcome is: Wilson's bound does, for 0 of `num_sequences`. A rate's
        interval is no narrower than Wilson's for as many independent trials as would vary as much as its resamples,
        and no more than sequences where some resample lacks an outcome: where a few sequences hold all of the rarer
        one, percentiles end too near it (`benchmarks/README.md`).

    Returns:
      The ends, [X] each; NaN where no resample has a value.
    """
    low, high = percentile_interval(samples_KxX)
    if bounds is None:
        return low, high
    if bounds == RATE:
        with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of columns without any value, which stay NaN
            trials = values_X * (1 - values_X) / np.nanvar(samples_KxX, axis=0)
        # Too few sequences hold the rarer outcome to show whether reads of one go together: suppose they do.
        few = (samples_KxX == bounds.low).any(axis=0) | (samples_KxX == bounds.high).any(axis=0)
        trials = np.where(few, np.minimum(trials, num_sequences), trials)
        rare_low, rare_high = wilson_interval(values_X * trials, trials)
        low, high = np.fmin(low, rare_low), np.fmax(high, rare_high)  # which pass over NaN: no spread
    margin = wilson_interval(np.zeros(1), np.array([num_sequences]))[1][0]
    agree = low == high
    low = np.where(agree, np.maximum(values_X - margin, bounds.low), low)
    high = np.where(agree, np.minimum(values_X + margin, bounds.high), high)
    return low, high


def percentile_interval(samples_KxX: np.ndarray, *, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ends of the percentile interval over resamples, [X] each; NaN where no resample has a value.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    tail = 50 * (1 - level)
    missing = np.isnan(samples_KxX)
    whole, some = ~missing.any(axis=0), missing.any(axis=0) & ~missing.all(axis=0)
    ends = np.full((2, samples_KxX.shape[1]), np.nan)
    # Percentiles that pass over NaN take a hundred times as long, and few statistics have any.
    for columns, percentile in ((whole, np.percentile), (some, np.nanpercentile)):
        if columns.any():
            ends[:, columns] = percentile(samples_KxX[:, columns], [tail, 100 - tail], axis=0)
    return ends[0], ends[1]


def wilson_interval(successes: np.ndarray, trials: np.ndarray, *, z: float = 1.959964) -> tuple[np.ndarray, np.ndarray]:
    """Returns Wilson's score interval of a rate, [X] each; NaN for no trial.

    Source: Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    successes, trials = np.asarray(successes, np.float64), np.asarray(trials, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = successes / trials
        centre = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
        half = z / (1 + z**2 / trials) * np.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    return np.maximum(centre - half, 0.0), np.minimum(centre + half, 1.0)


@jax.jit
def _ratios(counts_KxN: jax.Array, sums_NxX: jax.Array, totals_NxX: jax.Array) -> jax.Array:
    def drawn(x_NxX: jax.Array) -> jax.Array:
        return jnp.matmul(counts_KxN, x_NxX, precision="highest")

    totals = drawn(totals_NxX)
    return jnp.where(totals > 0, drawn(sums_NxX) / jnp.where(totals > 0, totals, 1.0), jnp.nan)
