"""Seeds that stand apart, against SciPy's t distribution and simulated rates."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from statsmodels.regression.linear_model import OLS

from kvjax.compare.outliers import LEVEL, outliers, outlying_stretches


@pytest.mark.parametrize("count", [4, 5, 10])
def test_rate_among_equal_seeds(count):
    """Of 3,000 groups of equal normal seeds the stated share has a named one, within four standard errors."""
    generator = np.random.default_rng(count)
    named = np.mean([bool(outliers(generator.normal(size=count).tolist())) for _ in range(3000)])
    assert abs(named - LEVEL) < 4 * np.sqrt(LEVEL / 3000)


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_limit_agrees_with_scipy(factor):
    """A seed is named just beyond the t quantile of its distance to the others, not just within."""
    others = np.array([0.90, 0.91, 0.93, 0.92])
    limit = scipy.stats.t.ppf(1 - LEVEL / 10, 3) * others.std(ddof=1) * np.sqrt(1 + 1 / 4)
    assert outliers([*others, others.mean() - factor * limit]) == ([4] if factor > 1 else [])


def test_seed_unlike_equal_others():
    """Others that agree in every digit are judged by what the values are known to, and without that not at all."""
    assert outliers([1.0, 1.0, 1.0, 1.0, 0.5]) == [] and outliers([1.0] * 5) == []
    births, gap = [500, 500, 500, 500], 100 / 12**0.5
    assert outliers([*births, 600], gap) == []
    # The error is 28.9 sqrt(1 + 1/4) = 32.3; t with 3 degrees of freedom reaches 10.21 at 0.01 / 5, two-sided.
    assert outliers([*births, 820], gap) == [] and outliers([*births, 840], gap) == [4]
    assert outliers([*births, 840], [gap, gap, gap, gap, None]) == [4]
    assert outliers([*births, 840], [gap, gap, gap, gap, 2 * gap]) == []


@pytest.mark.parametrize("deviation", [20.0, 40.0, 100.0, 300.0])
@pytest.mark.parametrize("count", [4, 5, 8])
def test_rate_on_a_grid_of_checkpoints(count, deviation):
    """Equal seeds whose births fall on checkpoints every 100 steps are named no more often than is stated."""
    generator = np.random.default_rng(count)
    born = np.ceil(generator.normal(1000, deviation, (2000, count)) / 100) * 100
    named = np.mean([bool(outliers(own, 100 / 12**0.5)) for own in born.tolist()])
    assert named < LEVEL + 4 * np.sqrt(LEVEL / 2000)


@pytest.mark.parametrize("count", [4, 5, 8])
def test_rate_near_perfect_accuracy(count):
    """Equal seeds that answer 99.9 % of 600 reads are named no more often than is stated."""
    generator = np.random.default_rng(count)
    right = generator.binomial(600, 0.999, (2000, count))
    shares = (right + 1) / 602
    errors = np.sqrt(shares * (1 - shares) / 600)
    named = np.mean([bool(outliers(a, e)) for a, e in zip((right / 600).tolist(), errors.tolist(), strict=True)])
    assert named < LEVEL + 4 * np.sqrt(LEVEL / 2000)


def test_too_few_seeds():
    """Three seeds, or four of which one has no value, are not judged."""
    assert outliers([0.0, 0.0, 100.0]) == []
    assert outliers([0.0, 0.01, 100.0, None]) == []


def test_stretch_of_a_trajectory():
    """A seed that leaves the others for three steps is named with them; one step alone does not count."""
    values = np.tile(np.array([0.5, 0.51, 0.49, 0.5, 0.5])[:, None], (1, 8))
    values[2, 3:6] = 5.0
    values[0, 0] = 5.0
    assert outlying_stretches(values, persistence=1) == [(2, 3, 5)]


@pytest.mark.parametrize("seed", range(20))
def test_seeds_agree_with_statsmodels(seed):
    """Those named are the ones whose deleted studentised residual statsmodels finds significant (Bonferroni)."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=int(generator.integers(4, 12)))
    values[0] += generator.choice([0.0, 5.0, 20.0])
    table = OLS(values, np.ones(len(values))).fit().outlier_test(method="bonferroni")
    outside = [not np.delete(values, i).min() <= value <= np.delete(values, i).max() for i, value in enumerate(values)]
    expected = [i for i in range(len(values)) if table[i, 2] < LEVEL and outside[i]]
    assert outliers(values.tolist()) == expected
