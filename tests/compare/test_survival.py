"""Survival over seeds, against scipy, a hand-computed case and identities."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from kvjax.compare.survival import Observation, kaplan_meier


def observations(steps, formed):
    return [Observation(step, born) for step, born in zip(steps, formed, strict=True)]


def test_curve_by_hand():
    """Five seeds, one lost at 500: 4/5, then 4/5 * 2/3, then that * 1/2; the fifth never forms it."""
    found = kaplan_meier(observations([250, 500, 750, 1000, 2000], [True, False, True, True, False]))
    assert found.steps == (250, 750, 1000)
    np.testing.assert_allclose(found.shares, (4 / 5, 8 / 15, 4 / 15), rtol=1e-15)
    assert (found.formed, found.total, found.median) == (3, 5, 1000)


@pytest.mark.parametrize("seed", range(8))
def test_curve_and_limits_agree_with_scipy(seed):
    """Shares and log-log limits are those of scipy's `ecdf`, which multiplies floats."""
    generator = np.random.default_rng(seed)
    count = int(generator.integers(3, 40))
    steps = generator.integers(1, 12, count) * 250
    formed = generator.random(count) < 0.7
    formed[0] = True
    found = kaplan_meier(observations(steps.tolist(), formed.tolist()))
    data = scipy.stats.CensoredData(uncensored=steps[formed], right=steps[~formed])
    expected = scipy.stats.ecdf(data).sf
    limits = expected.confidence_interval(method="log-log")
    at = np.isin(expected.quantiles, found.steps)
    np.testing.assert_allclose(found.shares, expected.probabilities[at], atol=1e-12)
    for ours, theirs in ((found.low, limits.low), (found.high, limits.high)):
        known = np.array([end is not None for end in ours])
        values = np.array([np.nan if end is None else end for end in ours])
        np.testing.assert_allclose(values[known], theirs.probabilities[at][known], atol=1e-12)
        assert not known[np.array(found.shares) == 0].any()


@pytest.mark.parametrize("count", [2, 4, 6, 8, 14, 18, 20, 24, 38, 44])
def test_median_of_an_even_number(count):
    """If all of an even number of seeds form it, half have after the middle one: exact where floats miss 1/2."""
    steps = [100 * (i + 1) for i in range(count)]
    assert kaplan_meier(observations(steps, [True] * count)).median == steps[count // 2 - 1]


def test_median_with_most_censored():
    """Where fewer than half formed it, there is no median; its lower limit may still be known."""
    found = kaplan_meier(observations([500, 4000, 4000, 4000, 4000], [True, False, False, False, False]))
    assert found.median is None
    assert found.median_high is None
    assert found.formed == 1


def test_nothing_formed():
    """Without a single birth the curve has no step."""
    found = kaplan_meier(observations([4000, 4000], [False, False]))
    assert (found.steps, found.median, found.formed, found.total) == ((), None, 0, 2)


def test_seed_censored_at_a_birth():
    """A seed censored at the step of another's birth was at risk there."""
    found = kaplan_meier(observations([500, 500], [True, False]))
    assert found.shares == (0.5,)
    assert found.median == 500


def test_limits_contain_the_median():
    """The median lies within its limits if both are known."""
    found = kaplan_meier(observations(list(range(100, 3100, 100)), [True] * 30))
    assert found.median_low <= found.median <= found.median_high


def test_no_seeds():
    """An empty comparison is an error of the caller."""
    with pytest.raises(ValueError, match="at least one seed"):
        kaplan_meier([])
