"""Intervals: a bootstrap over sequences, paired across checkpoints and stratified by split (docs/definitions.md).

Reads of one sequence share its writes and their answers may be copied from each other, so sequences are resampled, not
reads. One set of resamples serves all checkpoints of a run: changes between checkpoints, and the order in which metrics
move, are then compared within each resample. Everything is made from per-sequence sums; no forward pass is repeated.
"""

from __future__ import annotations

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
    chunks = range(0, sums_NxX.shape[1], _CHUNK)
    counts = jnp.asarray(counts_KxN)
    ratios = [_ratios(counts, sums_NxX[:, i : i + _CHUNK], totals_NxX[:, i : i + _CHUNK]) for i in chunks]
    return np.concatenate([np.asarray(x) for x in ratios], axis=1)


def percentile_interval(samples_KxX: np.ndarray, *, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ends of the percentile interval over resamples, [X] each; NaN where no resample has a value.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    tail = 50 * (1 - level)
    defined = ~np.isnan(samples_KxX).all(axis=0)
    ends = np.full((2, samples_KxX.shape[1]), np.nan)
    if defined.any():
        ends[:, defined] = np.nanpercentile(samples_KxX[:, defined], [tail, 100 - tail], axis=0)
    return ends[0], ends[1]


def wilson_interval(successes: np.ndarray, trials: np.ndarray, *, z: float = 1.959964) -> tuple[np.ndarray, np.ndarray]:
    """Returns Wilson's score interval of a rate, for rates of 0 or 1, where all resamples agree; NaN for no trial.

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
        return jnp.matmul(counts_KxN, x_NxX.astype(jnp.float32), precision="highest")

    totals = drawn(totals_NxX)
    return jnp.where(totals > 0, drawn(sums_NxX) / jnp.where(totals > 0, totals, 1.0), jnp.nan)
