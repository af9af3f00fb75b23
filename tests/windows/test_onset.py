"""Births, half-rises and the course of a movement, against hand-computed cases and scipy's isotonic regression."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import isotonic_regression

from kvjax.windows.onset import (
    birth,
    birth_indices,
    crossing_steps,
    half_rise_indices,
    isotonic_fit,
    movement_steps,
    observed_interval,
    precedence,
)


class TestBirth:
    def test_birth_of_a_metric_that_dips(self):
        """A birth is the first checkpoint at the threshold that enough further ones follow, later dips or not."""
        found = birth(np.array([0.1, 0.95, 0.2, 0.9, 0.91, 0.95, 0.5]), 0.9, persistence=2)
        assert (found.index, found.first_reached, found.open_from) == (3, 1, None)

    def test_threshold_reached_at_the_end(self):
        """A threshold reached with too few checkpoints left is open-ended, not a birth."""
        found = birth(np.array([0.1, 0.2, 0.95, 0.96]), 0.9, persistence=2)
        assert (found.index, found.first_reached, found.open_from) == (None, 2, 2)

    def test_threshold_never_reached(self):
        """A metric that stays below its threshold is not born; NaN is below it."""
        found = birth(np.array([0.1, 0.2, np.nan]), 0.9, persistence=2)
        assert (found.index, found.first_reached, found.open_from) == (None, None, None)

    def test_threshold_reached_and_lost(self):
        """A metric that falls below its threshold again is not born and not open-ended."""
        found = birth(np.array([0.1, 0.95, 0.2, 0.3]), 0.9, persistence=2)
        assert (found.index, found.first_reached, found.open_from) == (None, 1, None)

    def test_birth_indices_at_the_threshold(self):
        """A value at the threshold counts; the index of no birth is the number of checkpoints."""
        values = np.array([[0.0, 0.5, 0.5, 0.5], [0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]])
        assert birth_indices(values, 0.5, persistence=2).tolist() == [1, 4, 0]


def test_half_rise_by_hand():
    """The half-rise is the first checkpoint halfway up; a flat or falling metric has none."""
    values = np.array([[0, 0, 0.4, 0.6, 1, 1], [0, 0, 0, 0, 0, 0.01], [1, 1, 0.5, 0.5, 0, 0]])
    # Level 0 and plateau 1: halfway is 0.5, first reached at the fourth; no rise in the second, a fall in the third.
    assert half_rise_indices(values, side=2, floor=0.05).tolist() == [3, 6, 6]


@pytest.mark.parametrize("seed", range(5))
def test_isotonic_fit_against_scipy(seed):
    """The fit is SciPy's weighted isotonic regression."""
    rng = np.random.default_rng(seed)
    values, weights = rng.standard_normal(17).cumsum(), rng.uniform(0.2, 2, 17)
    fit = isotonic_fit(jnp.asarray(values, jnp.float32), jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(fit, isotonic_regression(values, weights=weights).x, rtol=1e-4, atol=1e-4)


def test_isotonic_fit_with_zero_weights():
    """Points of weight 0 do not change the fit of the others."""
    rng = np.random.default_rng(9)
    values, kept = rng.standard_normal(15), rng.random(15) < 0.6
    kept[[4, 11]] = True
    fit = isotonic_fit(jnp.asarray(values, jnp.float32), jnp.asarray(kept, jnp.float32))
    np.testing.assert_allclose(np.asarray(fit)[kept], isotonic_regression(values[kept]).x, rtol=1e-4, atol=1e-5)


def test_crossing_steps():
    """Levels are crossed at steps interpolated between checkpoints; a level never reached gives NaN."""
    fit, steps = jnp.asarray([0.0, 0.0, 0.5, 1.0]), jnp.asarray([100.0, 200.0, 1000.0, 1100.0])
    inside = jnp.ones(4, bool)
    found = crossing_steps(fit, steps, inside, jnp.asarray([0.0, 0.25, 0.5, 0.9, 1.5]))
    np.testing.assert_allclose(found, [100, 600, 1000, 1080, np.nan])


def course(values, steps, *, sign, first, last, segment=None, side=3, skipped=0):
    values = np.asarray(values, np.float32)
    segment = (0, len(values) - 1) if segment is None else segment
    found = movement_steps(
        jnp.asarray(values)[None, None],
        jnp.asarray(steps, jnp.float32),
        jnp.asarray([sign]),
        jnp.asarray([first]),
        jnp.asarray([last]),
        jnp.asarray([segment]),
        jnp.asarray(side),
        jnp.asarray(skipped),
    )
    return np.asarray(found)[0, 0]


class TestCourse:
    def test_rise_and_fall(self):
        """A fall has the course of the rise that mirrors it, here worked out by hand."""
        values, steps = np.array([0, 0, 0, 0.2, 0.8, 1, 1, 1.0]), np.arange(8) * 100
        rise = course(values, steps, sign=1.0, first=2, last=4)
        # Floor 0, plateau 1: 10 % between 200 and 300, 50 % between 300 and 400, 90 % between 400 and 500.
        np.testing.assert_allclose(rise, [250, 350, 450], rtol=1e-5)
        np.testing.assert_allclose(course(-values, steps, sign=-1.0, first=2, last=4), rise, rtol=1e-5)

    def test_course_beside_another_movement(self):
        """A later movement of the metric does not change the course of the first."""
        values, steps = [0, 0, 0, 1, 1, 3, 3, 3.0], np.arange(8) * 100
        np.testing.assert_allclose(course(values, steps, sign=1.0, first=2, last=2, segment=(0, 4)), [210, 250, 290])

    def test_course_over_a_missing_value(self):
        """A missing value inside a movement is bridged by its neighbours."""
        values, steps = [0, 0, 0, np.nan, 1, 1, 1.0], np.array([0, 1, 2, 3, 6, 7, 8]) * 100
        found = course(values, steps, sign=1.0, first=2, last=3)
        assert np.isfinite(found).all() and 200 <= found[0] <= found[1] <= found[2] <= 600

    def test_course_with_distant_levels(self):
        """Checkpoints beside a shift that still move can be left out of its levels, but never all of them."""
        values, steps = np.array([0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1.0]), np.arange(8) * 100
        near = course(values, steps, sign=1.0, first=3, last=3, side=2)
        far = course(values, steps, sign=1.0, first=3, last=3, side=4, skipped=2)
        # Levels 0.3 and 0.7, of which 10 % is 0.34; then 0 and 1.
        np.testing.assert_allclose(near, [270, 350, 430], atol=0.01)
        np.testing.assert_allclose(far, [150, 350, 550], atol=0.01)
        # Before it are 0.2 and 0.4 alone: levels 0.3 and 1, of which 10, 50 and 90 % are 0.37, 0.65 and 0.93.
        at_the_start = course(values[2:], steps[2:], sign=1.0, first=1, last=1, side=4, skipped=2)
        np.testing.assert_allclose(at_the_start, [285, 425, 565], atol=0.01)

    def test_course_of_a_flat_metric(self):
        """A flat metric has no onset, midpoint or completion."""
        assert np.isnan(course(np.zeros(8), np.arange(8), sign=1.0, first=3, last=3)).all()


class TestPrecedence:
    STEPS = np.array([0, 100, 200, 300])

    def test_midpoints_within_a_gap(self):
        """Midpoints in the same gap are undetermined and count one half each way."""
        first, second = np.array([50.0, 110, 210, 120]), np.array([150.0, 190, 110, np.nan])
        # Before; same gap; after; one that does not exist.
        found = precedence(first, second, self.STEPS)
        assert found.probability == pytest.approx((1 + 0.5 + 0) / 3) and found.undetermined == pytest.approx(1 / 3)
        # However far apart interpolation puts them.
        found = precedence(np.full(9, 101.0), np.full(9, 199.0), self.STEPS)
        assert (found.probability, found.undetermined) == (0.5, 1.0)

    def test_midpoint_at_a_checkpoint(self):
        """Reached at a checkpoint means reached in the gap that ends there."""
        found = precedence(np.array([100.0]), np.array([101.0]), self.STEPS)
        assert (found.probability, found.undetermined) == (1.0, 0.0)

    def test_no_midpoint(self):
        """Without a resample that has both midpoints there is no order."""
        assert precedence(np.array([np.nan]), np.array([5.0]), self.STEPS) is None


@pytest.mark.parametrize(
    ("moments", "samples", "expected"),
    [
        ([160.0], [160.0] * 40, (100, 200)),  # resamples that agree to the step know no more than the two checkpoints
        ([160.0], [], (100, 200)),  # a metric without resamples
        ([160.0], [160.0] * 36 + [210.0] * 4, (100, 400)),  # a tenth of the resamples lie in the next gap
        ([160.0], [160.0] * 99 + [50.0], (100, 200)),  # one in a hundred lies outside of the 95 %
        ([160.0, 90.0, np.nan], [160.0] * 40, (0, 200)),  # other levels before and after say earlier
        ([100.0], [100.0], (0, 100)),  # reached at a checkpoint
        ([np.nan, 5.0], [5.0], None),
    ],
)
def test_observed_interval(moments, samples, expected):
    """An interval holds the two checkpoints around the moment, and those around its resamples and other levels."""
    steps = np.array([0, 100, 200, 400])
    assert observed_interval(np.array(moments), [np.array(samples)], steps) == expected
    if expected:
        with_others = observed_interval(np.array(moments), [np.array(samples), np.full(40, 250.0)], steps)
        assert with_others == (expected[0], 400), "each of the estimates that are resampled widens it"
