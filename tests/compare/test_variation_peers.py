"""Variance shares and spreads, against statsmodels' mixed model and analysis of variance, and by hand."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import statsmodels.formula.api as smf
from statsmodels.stats.anova import anova_lm

from kvjax.compare.factors import summarize, summarize_events
from kvjax.compare.survival import Observation, kaplan_meier
from kvjax.compare.variation import seed_spread, variance_shares


def frame(groups) -> pd.DataFrame:
    rows = [(name, value) for name, values in enumerate(groups) for value in values]
    return pd.DataFrame(rows, columns=["setting", "value"])


def balanced(seed: int) -> list[np.ndarray]:
    """Draws 6 settings of 4 seeds, whose settings differ about as much as their seeds."""
    generator = np.random.default_rng(seed)
    return list(generator.normal(size=(6, 1)) + generator.normal(size=(6, 4)))


def test_shares_by_hand():
    """Three settings of two seeds: means 2, 4, 9, squares 39 * 2 / 2 = 26 * 2 between and 2 within.

    Grand mean 5: between 2 * (9 + 1 + 16) / 2 = 26, within (2 + 2 + 2) / 3 = 2, so that the variance between settings
    is (26 - 2) / 2 = 12 and its share 12 / 14.
    """
    found = variance_shares([np.array([1.0, 3.0]), np.array([3.0, 5.0]), np.array([8.0, 10.0])])
    assert (found.between, found.within) == pytest.approx((12.0, 2.0))
    assert found.share == pytest.approx(12 / 14)


@pytest.mark.parametrize("seed", range(8))
def test_variances_agree_with_a_mixed_model(seed):
    """Of balanced data the restricted likelihood has the same optimum: statsmodels finds it by iteration."""
    groups = balanced(seed)
    found = variance_shares(groups)
    data = frame(groups)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may say that a variance is near 0
        fit = smf.mixedlm("value ~ 1", data, groups=data["setting"]).fit(reml=True)
    assert fit.scale == pytest.approx(found.within, rel=1e-2)
    # Not `params`, which are divided by the scale.
    assert float(fit.cov_re.iloc[0, 0]) == pytest.approx(found.between, rel=1e-2, abs=1e-2)


@pytest.mark.parametrize("seed", range(6))
def test_mean_squares_agree_with_statsmodels(seed):
    """Of unequal groups the mean squares are those of a linear model's table."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(2, 7, 5)
    groups = [generator.normal(3 * i, 1.0, size) for i, size in enumerate(sizes)]
    table = anova_lm(smf.ols("value ~ C(setting)", frame(groups)).fit())
    found = variance_shares(groups)
    assert found.within == pytest.approx(table["mean_sq"]["Residual"], rel=1e-9)
    size = (sizes.sum() - (sizes**2).sum() / sizes.sum()) / 4
    assert found.between * size + found.within == pytest.approx(table["mean_sq"]["C(setting)"], rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_limits_agree_with_f_quantiles(seed):
    """The limits are those at which the ratio of mean squares would be a 2.5 % event, by SciPy's distribution.

    The ratio of mean squares, divided by 1 + n s / (1 - s) for a share s, has an F distribution.
    """
    groups = balanced(seed)
    found = variance_shares(groups)
    assert found.between > 0
    ratio = (found.between * 4 + found.within) / found.within
    for share, tail in ((found.low, 0.975), (found.high, 0.025)):
        if share > 0:  # a lower limit below 0 is cut
            expected = ratio / (1 + 4 * share / (1 - share))
            assert scipy.stats.f.cdf(expected, 5, 18) == pytest.approx(tail, abs=1e-6)


def test_coverage_with_unequal_groups():
    """Of simulated studies with 3 to 6 seeds a setting about 95 % of the approximate intervals hold the share."""
    generator = np.random.default_rng(3)
    covered = []
    for _ in range(1000):
        sizes = generator.integers(3, 7, 8)
        groups = [generator.normal() + generator.normal(size=size) for size in sizes]
        found = variance_shares(groups)
        covered.append(found.low is not None and found.low <= 0.5 <= found.high)
    assert 0.92 <= np.mean(covered) <= 0.975  # standard error 0.007, and the interval is approximate


def test_differences_between_settings():
    """A difference is a setting's median less the base's, as pandas groups them; a missing value is left out."""
    values = [{"7": 1.0, "11": 3.0, "13": 8.0}, {"7": 2.0, "11": None, "13": 5.0}]
    found = summarize("1", ["base", "other"], values)
    medians = frame([[1.0, 3.0, 8.0], [2.0, 5.0]]).groupby("setting")["value"].median()
    assert list(found["medians"].values()) == pytest.approx(medians.tolist())
    assert found["difference"] == {"base": 0.0, "other": pytest.approx(medians[1] - medians[0])}


def test_births_of_settings_with_censored_runs():
    """A birth that two of five runs reached has no median, and no variance: the middle of the two is no middle."""
    steps = [{"7": 500.0, "11": 700.0, "13": 600.0}, {"7": 300.0, "11": None, "13": None}]
    observed = [[Observation(int(step or 2000), step is not None) for step in own.values()] for own in steps]
    medians = [kaplan_meier(own).median for own in observed]
    assert medians == [600, None]
    found = summarize_events(["base", "other"], steps, medians)
    assert found["medians"] == {"base": 600.0, "other": None} and found["difference"] == {"base": 0.0, "other": None}
    assert found["shares"] is None
    whole = summarize_events(["base", "other"], [steps[0], {"7": 300.0, "11": 350.0, "13": 400.0}], [600, 350])
    assert whole["difference"]["other"] == -250.0
    assert whole["shares"] == summarize("steps", ["base", "other"], list(whole["values"].values()))["shares"]


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_spread_agrees_with_pandas(count):
    """Median, ends and deviation are those of a pandas series, which leaves out what is missing."""
    generator = np.random.default_rng(count)
    values = [*generator.normal(size=count).tolist(), None]
    found, series = seed_spread(values), pd.Series(values, dtype=float)
    assert (found.median, found.low, found.high) == pytest.approx((series.median(), series.min(), series.max()))
    assert found.deviation == (None if count == 1 else pytest.approx(series.std()))


def test_sampling_share_of_simulated_seeds():
    """If seeds differ by the choice of sequences alone, the share is near 1; if they truly differ as much, near 1/2."""
    generator = np.random.default_rng(0)
    noise = generator.normal(0.0, 0.02, 4000)
    assert seed_spread((0.9 + noise).tolist(), [0.02] * 4000).sampling_share == pytest.approx(1.0, abs=0.05)
    truly = generator.normal(0.0, 0.02, 4000)
    found = seed_spread((0.9 + noise + truly).tolist(), [0.02] * 4000).sampling_share
    assert found == pytest.approx(0.5, abs=0.03)
