"""Intervals: a bootstrap over sequences, paired across checkpoints and stratified by split (docs/definitions.md).

Reads of one sequence share its writes and their answers may be copied from each other, so sequences are resampled, not
reads. One set of resamples serves all checkpoints of a run: changes between checkpoints, and the order in which metrics
move, are then compared within each resample. Everything is made from per-sequence sums; no forward pass is repeated.
"""

from __future__ import annotations

import dataclasses

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


def resample_counts(splits_N: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Draws how often each sequence counts in each resample, float32 [J, N].

    Within every split as many sequences are drawn, with replacement, as it has. Drawn by NumPy, so that a seed means
    the same resamples on every device.

    Args:
      splits_N: the split of each sequence, any integers.
      resamples: J.
      seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    counts = np.zeros((resamples, len(splits_N)), np.float32)
    for split in np.unique(splits_N):
        members = np.flatnonzero(splits_N == split)
        counts[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=resamples)
    return counts


def ratios(sums_CxNxX: np.ndarray, totals_CxNxX: np.ndarray) -> np.ndarray:
    """Divides sums over sequences, [C, *X] in float64; NaN if nothing counts.

    Args:
      sums_CxNxX: per sequence, the numerators at each checkpoint.
      totals_CxNxX: per sequence, the denominators; each axis but N of its length, or 1 if all share it.
    """
    totals = totals_CxNxX.sum(axis=1, dtype=np.float64)
    sums = sums_CxNxX.sum(axis=1, dtype=np.float64)
    return np.divide(sums, totals, out=np.full(sums.shape, np.nan), where=totals != 0)


def resampled_ratios(
    counts_JxN: np.ndarray, sums_CxNxX: np.ndarray, totals_CxNxX: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Divides sums over sequences and sums over resampled sequences.

    Args:
      counts_JxN: how often each resample draws each sequence, from `resample_counts`.
      sums_CxNxX: per sequence, the numerators at each checkpoint.
      totals_CxNxX: per sequence, the denominators; each axis but N of its length, or 1 if all share it.

    Returns:
      The ratios [C, *X] as `ratios` gives them; and under each resample, float32 [J, C, *X], NaN if none of its
      sequences counts.
    """

    # In float32 a product's rounding depends on its size, on some CPUs, and so on how many checkpoints go together.
    counts_NxJ = counts_JxN.T.astype(np.float64)

    def resampled(x_CxNxX: np.ndarray) -> np.ndarray:
        by_sequence = np.moveaxis(x_CxNxX, 1, 0)
        flat = np.asarray(by_sequence.reshape(len(by_sequence), -1), np.float64)
        sums = np.matmul(flat.T, counts_NxJ).T
        return sums.reshape(len(sums), *by_sequence.shape[1:])

    sums, totals = resampled(sums_CxNxX), resampled(totals_CxNxX)
    samples = np.full(sums.shape, np.nan, np.float32)
    np.divide(sums, totals, out=samples, where=totals > 0, casting="same_kind")
    return ratios(sums_CxNxX, totals_CxNxX), samples


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The least and the largest value that a rate, or a difference of rates, can have."""

    low: float
    high: float


RATE = Bounds(0.0, 1.0)
DIFFERENCE_OF_RATES = Bounds(-1.0, 1.0)


def interval(
    values_X: np.ndarray, samples_JxX: np.ndarray, num_sequences: int, *, bounds: Bounds | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Forms the 95 % interval of X statistics from their resamples.

    This is the percentile interval, with two corrections for rates (coverage in `benchmarks/README.md`):

    - If all resamples agree, as for rates of 0 and 1, it is Wilson's for 0 of `num_sequences`.
    - It is widened to the interval of `modified_wilson_interval`.

    Args:
      values_X: the statistics.
      samples_JxX: under J resamples of sequences.
      num_sequences: how many sequences were resampled.
      bounds: of a rate or a difference of rates; None for other statistics.

    Returns:
      The ends, [X] each; NaN if no resample has a value, or if a single sequence, which every resample repeats, is to
      bound a statistic that is no rate.
    """
    low, high = percentile_interval(samples_JxX)
    if bounds is None:
        return (low, high) if num_sequences > 1 else (np.full_like(low, np.nan), np.full_like(high, np.nan))
    if bounds == RATE:
        ends = modified_wilson_interval(values_X, samples_JxX, num_sequences)
        low, high = np.fmin(low, ends[0]), np.fmax(high, ends[1])  # they ignore NaN: no spread
    margin = wilson_interval(np.zeros(1), np.array([num_sequences]))[1][0]
    agree = low == high
    low = np.where(agree, np.maximum(values_X - margin, bounds.low), low)
    high = np.where(agree, np.minimum(values_X + margin, bounds.high), high)
    return low, high


def modified_wilson_interval(
    rates_X: np.ndarray, samples_JxX: np.ndarray, num_sequences: int
) -> tuple[np.ndarray, np.ndarray]:
    """Forms Wilson intervals of rates over clustered reads, with the effective sample size in place of the reads.

    The effective sample size is n_eff = p(1 - p) / Var(resamples). If any resample contains only one outcome, too few
    sequences hold the rarer one to show whether reads of one agree: n_eff is then at most `num_sequences`.

    Returns:
      The ends, [X] each; NaN if no resample has a value, or if they do not vary.
      Source: Korn & Graubard, Confidence intervals for proportions with small expected number of positive counts
      estimated from survey data (1998), which modifies an exact interval in this way; here it is Wilson's.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        effective = rates_X * (1 - rates_X) / _variance(samples_JxX)
    few = (samples_JxX == RATE.low).any(axis=0) | (samples_JxX == RATE.high).any(axis=0)
    effective = np.where(few, np.minimum(effective, num_sequences), effective)
    return wilson_interval(rates_X * effective, effective)


def percentile_interval(samples_JxX: np.ndarray, *, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Forms the percentile interval over resamples, [X] each; NaN if no resample has a value.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    # Sorting rows takes half the time of np.percentile, and np.nanpercentile a hundred times as much. NaN comes last.
    ordered_XxJ = np.sort(np.ascontiguousarray(samples_JxX.T), axis=1)
    last_X = np.count_nonzero(~np.isnan(ordered_XxJ), axis=1) - 1  # -1, a NaN, where there is none

    def percentile(share: float) -> np.ndarray:
        position_X = share * np.maximum(last_X, 0)
        below_X = np.floor(position_X).astype(int)
        low, high = (
            np.take_along_axis(ordered_XxJ, at[:, None], axis=1)[:, 0].astype(np.float64)
            for at in (below_X, np.minimum(below_X + 1, last_X))
        )
        return low + (high - low) * (position_X - below_X)

    return percentile((1 - level) / 2), percentile((1 + level) / 2)


def _variance(samples_JxX: np.ndarray) -> np.ndarray:
    """Computes the variance of the resamples that have a value, [X]; NaN if none has."""
    variances = np.var(samples_JxX, axis=0, dtype=np.float64)
    missing = np.isnan(variances)
    if missing.any():  # few columns; np.nanvar would warn of empty ones, and warnings cannot be caught in threads
        some = samples_JxX[:, missing].astype(np.float64)
        there = ~np.isnan(some)
        number = np.where(there.any(axis=0), there.sum(axis=0), np.nan)
        means = np.where(there, some, 0.0).sum(axis=0) / number
        variances[missing] = np.where(there, (some - means) ** 2, 0.0).sum(axis=0) / number
    return variances


def wilson_interval(successes: np.ndarray, trials: np.ndarray, *, z: float = 1.959964) -> tuple[np.ndarray, np.ndarray]:
    """Forms Wilson's score interval of a rate, [X] each; NaN for no trial.

    Source: Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    successes, trials = np.asarray(successes, np.float64), np.asarray(trials, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = successes / trials
        centre = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
        half = z / (1 + z**2 / trials) * np.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    # Equal by algebra, not by rounding: 0 of 7 would begin at 3e-17, and so exclude 0.
    low, high = np.where(rate == 0, 0.0, centre - half), np.where(rate == 1, 1.0, centre + half)
    return np.maximum(low, 0.0), np.minimum(high, 1.0)
