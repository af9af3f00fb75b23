"""Survival over seeds, against lifelines and statsmodels, and births that are seen only between two checkpoints."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from lifelines import KaplanMeierFitter
from lifelines.utils import median_survival_times
from statsmodels.duration.survfunc import SurvfuncRight

from kvjax.compare.survival import Observation, kaplan_meier

SEEDS = range(12)


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws steps and whether something formed there, of 3 to 40 seeds with ties; at least one formed."""
    generator = np.random.default_rng(seed)
    count = int(generator.integers(3, 41))
    steps, formed = generator.integers(1, 12, count) * 250, generator.random(count) < 0.7
    formed[0] = True
    return steps, formed


def ours(steps, formed):
    return kaplan_meier([Observation(int(step), bool(born)) for step, born in zip(steps, formed, strict=True)])


@pytest.mark.parametrize("seed", SEEDS)
def test_curve_and_limits_agree_with_lifelines(seed):
    """Shares and log-log limits are lifelines' at every birth."""
    steps, formed = drawn(seed)
    found, fitter = ours(steps, formed), KaplanMeierFitter().fit(steps, formed)
    np.testing.assert_allclose(found.shares, fitter.survival_function_at_times(found.steps), atol=1e-12)
    limits = fitter.confidence_interval_survival_function_.loc[list(found.steps)].to_numpy()
    for end, theirs in ((found.low, limits[:, 0]), (found.high, limits[:, 1])):
        for own, other, share in zip(end, theirs, found.shares, strict=True):
            # At a share of 0 lifelines gives 0 to 0, where no limits are known.
            assert (own is None) if share in (0, 1) else own == pytest.approx(other, abs=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_curve_and_deviations_agree_with_statsmodels(seed):
    """Shares are statsmodels', and half the width of the limits on the log-log scale its deviation there."""
    steps, formed = drawn(seed)
    found, other = ours(steps, formed), SurvfuncRight(steps, formed.astype(int))
    at = np.isin(other.surv_times, found.steps)
    np.testing.assert_allclose(found.shares, other.surv_prob[at], atol=1e-12)
    for share, low, high, deviation in zip(found.shares, found.low, found.high, other.surv_prob_se[at], strict=True):
        if low is not None:
            # d log(-log S) = dS / (S log S)
            width = 1.959963984540054 * deviation / (share * abs(math.log(share)))
            ends = [math.log(-math.log(end)) for end in (high, low)]
            assert (ends[1] - ends[0]) / 2 == pytest.approx(width, rel=1e-9)


def median_by_the_rule(steps, formed) -> int | None:
    """The first step after which at most half have not formed it, in integers, written down step by step."""
    share = Fraction(1)
    for step in sorted(set(steps[formed].tolist())):
        share *= 1 - Fraction(int((formed & (steps == step)).sum()), int((steps >= step).sum()))
        if share <= Fraction(1, 2):
            return step
    return None


@pytest.mark.parametrize("seed", range(60))
def test_median_by_the_rule(seed):
    """The median follows its rule; lifelines has it in floats, and agrees unless a share is exactly 1/2."""
    steps, formed = drawn(seed)
    found = ours(steps, formed)
    assert found.median == median_by_the_rule(steps, formed)
    if not any(abs(share - 0.5) < 1e-9 for share in found.shares):
        theirs = KaplanMeierFitter().fit(steps, formed).median_survival_time_
        assert (math.inf if found.median is None else found.median) == theirs


@pytest.mark.parametrize("seed", range(30))
def test_limits_of_the_median_agree_with_lifelines(seed):
    """Limits of the median are where the curve's limits cross 1/2."""
    steps, formed = drawn(seed)
    found, fitter = ours(steps, formed), KaplanMeierFitter().fit(steps, formed)
    if found.shares[-1] == 0:  # lifelines puts the limits at 0 there; no interval is known
        return
    theirs = median_survival_times(fitter.confidence_interval_survival_function_).to_numpy()[0]
    mine = [math.inf if end is None else end for end in (found.median_low, found.median_high)]
    assert mine == theirs.tolist()


@pytest.mark.parametrize("seed", range(6))
def test_births_between_checkpoints(seed):
    """A birth is seen between two checkpoints. Where runs share checkpoints, dating it at the later one loses nothing.

    The oracle is Turnbull's estimate of interval-censored data. lifelines takes closed intervals, so that a birth after
    step 250 begins at 251. Runs that never form it are open to the right.
    """
    generator = np.random.default_rng(seed)
    checkpoints = np.arange(1, 9) * 250
    born = generator.integers(1, 2600, 24)
    index = np.searchsorted(checkpoints, born)
    formed = index < len(checkpoints)
    seen = np.where(formed, checkpoints[np.minimum(index, 7)], checkpoints[-1])
    lower = np.where(formed, seen - 250 + 1, checkpoints[-1] + 1)
    upper = np.where(formed, seen, np.inf)
    fitter = KaplanMeierFitter().fit_interval_censoring(lower, upper, tol=1e-9)
    curve = fitter.survival_function_
    found = ours(seen, formed)
    for step, share in zip(found.steps, found.shares, strict=True):
        after = curve.loc[curve.index > step, "NPMLE_estimate_upper"]  # the level up to the next birth
        assert share == pytest.approx(after.iloc[0] if len(after) else 0.0, abs=1e-6)
