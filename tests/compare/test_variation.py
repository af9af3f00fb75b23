"""Variance between and within groups, against published numbers and SciPy's analysis of variance."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from kvjax.compare.variation import seed_spread, variance_shares

# Four judges of six targets: Shrout and Fleiss 1979, table 2.
RATINGS = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]


def test_share_of_a_published_table():
    """The share is the published intraclass correlation ICC(1,1) = 0.17; its lower limit is negative and cut at 0."""
    found = variance_shares([np.array(row) for row in RATINGS])
    assert found.share == pytest.approx(0.17, abs=0.005)
    assert found.low == 0
    assert found.high == pytest.approx(0.723, abs=0.001)


def test_ratio_agrees_with_scipy():
    """The mean squares give SciPy's F for unequal groups."""
    generator = np.random.default_rng(0)
    groups = [generator.normal(i, 1.0, size) for i, size in enumerate((3, 5, 4))]
    found = variance_shares(groups)
    sizes = np.array([3, 5, 4])
    size = (12 - (sizes**2).sum() / 12) / 2
    expected = scipy.stats.f_oneway(*groups).statistic
    assert (found.between * size + found.within) / found.within == pytest.approx(expected, rel=1e-12)


def test_coverage_of_the_interval():
    """Of simulated studies with 8 groups of 3 about 95 % of intervals hold the true share of 0.5."""
    generator = np.random.default_rng(1)
    covered = []
    for _ in range(1000):
        groups = generator.normal(size=(8, 1)) + generator.normal(size=(8, 3))
        found = variance_shares(list(groups))
        covered.append(found.low is not None and found.low <= 0.5 <= found.high)
    assert 0.93 <= np.mean(covered) <= 0.97  # standard error 0.007


def test_groups_whose_members_are_alike():
    """If all seeds of a setting end alike, all variance is between settings."""
    found = variance_shares([np.array([1.0, 1.0]), np.array([2.0, 2.0]), np.array([4.0, 4.0])])
    assert (found.share, found.low, found.within) == (1.0, None, 0.0)
    assert found.between == pytest.approx(np.var([1, 2, 4], ddof=1))


def test_groups_that_differ_less_than_their_members():
    """A negative component counts as 0, and no share lies within the limits."""
    found = variance_shares([np.array([0.0, 2.0]), np.array([0.1, 1.9]), np.array([0.2, 1.8])])
    assert (found.between, found.share, found.low, found.high) == (0.0, 0.0, None, None)


@pytest.mark.parametrize("groups", [[[1.0, 2.0]], [[1.0], [2.0]], [[np.nan, 1.0], [2.0]]])
def test_too_few_values(groups):
    """One group, or one value a group, tells nothing."""
    assert variance_shares([np.array(group) for group in groups]) is None


def test_nothing_varies():
    """Equal values everywhere have no share."""
    assert variance_shares([np.ones(2), np.ones(2)]).share is None


def test_spread_by_hand():
    """Median, range and deviation leave out a seed without a value; the sampling share is a ratio of variances."""
    found = seed_spread([0.9, None, 0.7, 0.8], [0.01, None, 0.01, 0.02])
    assert (found.median, found.low, found.high) == (0.8, 0.7, 0.9)
    assert found.deviation == pytest.approx(0.1)
    assert found.sampling_share == pytest.approx(np.mean([1e-4, 1e-4, 4e-4]) / 0.01)


def test_spread_of_one_seed_and_of_none():
    """A single seed has no deviation, and none have no spread."""
    assert seed_spread([0.5]).deviation is None
    assert seed_spread([None, float("nan")]) is None
