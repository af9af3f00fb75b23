"""Resampling sequences: counts, ratios and intervals, against what can be computed directly."""

import warnings

import numpy as np
import scipy.stats

from kvjax.measure.uncertainty import (
    DIFFERENCE_OF_RATES,
    RATE,
    interval,
    percentile_interval,
    resample_counts,
    resampled_ratios,
    wilson_interval,
)
from tests.helpers.scores import score_interval


def resampled(counts, sums, totals):
    """Returns the ratios of one checkpoint under every resample, [K, X]."""
    _, samples = resampled_ratios(counts, sums[None], totals[None])
    return samples[:, 0]


def test_resample_counts():
    """Each resample draws as many sequences of a split as it has, by the seed."""
    splits = np.array([0] * 5 + [2] * 8)
    counts = resample_counts(splits, resamples=50, seed=3)
    assert (counts[:, :5].sum(axis=1) == 5).all() and (counts[:, 5:].sum(axis=1) == 8).all()
    assert np.array_equal(counts, resample_counts(splits, resamples=50, seed=3))
    assert not np.array_equal(counts, resample_counts(splits, resamples=50, seed=4))


def test_bootstrap_ratios():
    """A resample's ratio is that of the sequences drawn."""
    rng = np.random.default_rng(0)
    counts = resample_counts(np.zeros(6, int), resamples=20, seed=1)
    sums, totals = rng.random((6, 3)), rng.integers(0, 4, (6, 3)).astype(float)
    ours = resampled(counts, sums, totals)
    for k, drawn in enumerate(counts.astype(int)):
        rows = np.repeat(np.arange(6), drawn)
        for x in range(3):
            total = totals[rows, x].sum()
            expected = sums[rows, x].sum() / total if total else np.nan
            np.testing.assert_allclose(ours[k, x], expected, rtol=1e-5)


def test_width_of_an_interval():
    """If all reads of a sequence agree, the standard error is that of as many reads as sequences."""
    rng = np.random.default_rng(5)
    sequences, reads = 400, 7
    counts = resample_counts(np.zeros(sequences, int), resamples=4000, seed=2)

    def width(right):
        low, high = percentile_interval(resampled(counts, right[:, None], np.full((sequences, 1), float(reads))))
        return (high - low)[0]

    def theory(right, trials):
        rate = right.mean() / reads
        return 2 * 1.96 * np.sqrt(rate * (1 - rate) / trials)

    agreeing = (rng.random(sequences) < 0.3) * float(reads)
    assert abs(width(agreeing) / theory(agreeing, sequences) - 1) < 0.08
    # Reads that have nothing to do with each other are as many trials as there are reads.
    independent = rng.binomial(reads, 0.3, sequences).astype(float)
    assert abs(width(independent) / theory(independent, sequences * reads) - 1) < 0.08


def test_wilson_interval():
    """Wilson intervals equal SciPy's."""
    for right, trials in ((0, 12), (12, 12), (5, 9)):
        theirs = scipy.stats.binomtest(right, trials).proportion_ci(method="wilson")
        np.testing.assert_allclose(wilson_interval(right, trials), (theirs.low, theirs.high), atol=1e-6)
    assert np.isnan(wilson_interval(0, 0)[0])


def test_wilson_interval_of_rates_0_and_1():
    """An event that never happened leaves 0 in its interval exactly, and one that always did leaves 1."""
    trials = np.arange(1, 2001)
    assert not wilson_interval(np.zeros(len(trials)), trials)[0].any()
    assert (wilson_interval(trials, trials)[1] == 1).all()


def test_rates_without_spread():
    """A rate on which all resamples agree gets Wilson's bounds."""
    values = np.array([0.0, 1.0, 0.3, 0.0])
    samples = np.tile(values, (50, 1))
    samples[:25, 2] = 0.4
    low, high = interval(values, samples, 30, bounds=RATE)
    theirs = scipy.stats.binomtest(0, 30).proportion_ci(method="wilson").high
    np.testing.assert_allclose(low[[0, 1, 3]], [0, 1 - theirs, 0], atol=1e-6)
    np.testing.assert_allclose(high[[0, 1, 3]], [theirs, 1, theirs], atol=1e-6)
    # Resamples that vary by 0.05 around 0.3 are those of 84 independent trials.
    np.testing.assert_allclose([low[2], high[2]], score_interval(0.3, 84), atol=1e-5)
    low, high = interval(values, samples, 30, bounds=DIFFERENCE_OF_RATES)
    np.testing.assert_allclose(low[[0, 1]], [-theirs, 1 - theirs], atol=1e-6)
    low, high = interval(values, samples, 30)
    assert (low[[0, 1, 3]] == high[[0, 1, 3]]).all(), "what is no rate has no such bound"
    assert (low[2], high[2]) == (0.3, 0.4)


def test_rare_rate_of_agreeing_reads():
    """If the reads of a sequence agree, each sequence counts as one trial."""
    right = np.zeros((96, 1))
    right[0] = 7.0  # all of one sequence's reads, none of another's
    samples = resampled(resample_counts(np.zeros(96, int), seed=4), right, np.full((96, 1), 7.0))
    _, high = interval(right.mean(axis=0) / 7, samples, 96, bounds=RATE)
    theirs = scipy.stats.binomtest(1, 96).proportion_ci(method="wilson").high
    assert percentile_interval(samples)[1] < 0.8 * theirs
    np.testing.assert_allclose(high, theirs, rtol=0.05)


def test_rare_rate_of_single_reads():
    """Two sequences with one right read each do not show that reads of a sequence are independent."""
    right = np.zeros((96, 1))
    right[[3, 50]] = 1.0
    samples = resampled(resample_counts(np.zeros(96, int), seed=4), right, np.full((96, 1), 7.0))
    _, high = interval(right.mean(axis=0) / 7, samples, 96, bounds=RATE)
    np.testing.assert_allclose(high, score_interval(2 / 672, 96)[1], rtol=1e-5)


def test_resamples_without_a_value():
    """Resamples without a value are passed over."""
    samples = np.array([[1.0, np.nan, 1.0], [np.nan, np.nan, 2.0], [3.0, np.nan, 3.0]])
    low, high = percentile_interval(samples)
    np.testing.assert_allclose(low[[0, 2]], [1.05, 1.05])
    np.testing.assert_allclose(high[[0, 2]], [2.95, 2.95])
    assert np.isnan(low[1]) and np.isnan(high[1])


def test_percentiles():
    """Percentiles equal NumPy's, also among missing values."""
    samples = np.random.default_rng(5).normal(size=(1000, 40)).astype(np.float32)
    samples[np.random.default_rng(6).random(samples.shape) < np.linspace(0, 0.9, 40)] = np.nan
    expected = np.nanpercentile(samples.astype(np.float64), [2.5, 97.5], axis=0)
    np.testing.assert_allclose(percentile_interval(samples), expected, rtol=1e-12)


def test_mean_of_a_single_sequence():
    """Every resample of one sequence is that sequence: a mean has no interval, a rate Wilson's for one trial."""
    samples = np.full((20, 1), 0.25)
    assert np.isnan(interval(np.array([0.25]), samples, 1)).all()
    low, high = interval(np.array([1.0]), np.ones((20, 1)), 1, bounds=RATE)
    np.testing.assert_allclose([low, high], [[1 / (1 + 1.959964**2)], [1.0]], rtol=1e-5)


def test_rate_without_reads():
    """A rate without any read has no interval, and gives no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low, high = interval(np.array([np.nan, 0.0]), np.array([[np.nan, 0.0]] * 20), 12, bounds=RATE)
    assert np.isnan([low[0], high[0]]).all() and high[1] > 0.1
