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
    probability_of_preceding,
)


class TestBirth:
    def test_first_checkpoint_that_is_followed_by_enough(self):
        found = birth(np.array([0.1, 0.95, 0.2, 0.9, 0.91, 0.95, 0.5]), 0.9, persistence=2)
        assert (found.index, found.first_reached, found.open_ended) == (3, 1, False)

    def test_reached_too_late_to_tell(self):
        found = birth(np.array([0.1, 0.2, 0.95, 0.96]), 0.9, persistence=2)
        assert (found.index, found.first_reached, found.open_ended) == (None, 2, True)

    def test_never_reached(self):
        found = birth(np.array([0.1, 0.2, np.nan]), 0.9, persistence=2)
        assert (found.index, found.first_reached, found.open_ended) == (None, None, False)

    def test_reached_and_lost(self):
        found = birth(np.array([0.1, 0.95, 0.2, 0.3]), 0.9, persistence=2)
        assert (found.index, found.first_reached, found.open_ended) == (None, 1, False)

    def test_exactly_at_the_threshold_counts_and_none_is_c(self):
        values = np.array([[0.0, 0.5, 0.5, 0.5], [0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]])
        assert birth_indices(values, 0.5, persistence=2).tolist() == [1, 4, 0]


def test_half_rise_by_hand():
    values = np.array([[0, 0, 0.4, 0.6, 1, 1], [0, 0, 0, 0, 0, 0.01], [1, 1, 0.5, 0.5, 0, 0]])
    # Level 0 and plateau 1: halfway is 0.5, first reached at the fourth; no rise in the second, a fall in the third.
    assert half_rise_indices(values, side=2, floor=0.05).tolist() == [3, 6, 6]


@pytest.mark.parametrize("seed", range(5))
def test_isotonic_fit_is_scipys(seed):
    rng = np.random.default_rng(seed)
    values, weights = rng.standard_normal(17).cumsum(), rng.uniform(0.2, 2, 17)
    fit = isotonic_fit(jnp.asarray(values, jnp.float32), jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(fit, isotonic_regression(values, weights=weights).x, rtol=1e-4, atol=1e-4)


def test_isotonic_fit_with_weight_zero_is_the_fit_without_those_points():
    rng = np.random.default_rng(9)
    values, kept = rng.standard_normal(15), rng.random(15) < 0.6
    kept[[4, 11]] = True
    fit = isotonic_fit(jnp.asarray(values, jnp.float32), jnp.asarray(kept, jnp.float32))
    np.testing.assert_allclose(np.asarray(fit)[kept], isotonic_regression(values[kept]).x, rtol=1e-4, atol=1e-5)


def test_crossings_are_interpolated_in_steps():
    fit, steps = jnp.asarray([0.0, 0.0, 0.5, 1.0]), jnp.asarray([100.0, 200.0, 1000.0, 1100.0])
    inside = jnp.ones(4, bool)
    found = crossing_steps(fit, steps, inside, jnp.asarray([0.0, 0.25, 0.5, 0.9, 1.5]))
    np.testing.assert_allclose(found, [100, 600, 1000, 1080, np.nan])


def course(values, steps, *, sign, first, last, segment=None, side=3):
    values = np.asarray(values, np.float32)
    segment = (0, len(values) - 1) if segment is None else segment
    found = movement_steps(
        jnp.asarray(values)[None, None],
        jnp.asarray(steps, jnp.float32),
        jnp.asarray([sign]),
        jnp.asarray([first]),
        jnp.asarray([last]),
        jnp.asarray([segment]),
        side=side,
    )
    return np.asarray(found)[0, 0]


class TestCourse:
    def test_rise_and_fall_mirror_each_other(self):
        values, steps = np.array([0, 0, 0, 0.2, 0.8, 1, 1, 1.0]), np.arange(8) * 100
        rise = course(values, steps, sign=1.0, first=2, last=4)
        # Floor 0, plateau 1: 10 % between 200 and 300, 50 % between 300 and 400, 90 % between 400 and 500.
        np.testing.assert_allclose(rise, [250, 350, 450], rtol=1e-5)
        np.testing.assert_allclose(course(-values, steps, sign=-1.0, first=2, last=4), rise, rtol=1e-5)

    def test_another_movement_of_the_metric_stays_outside(self):
        values, steps = [0, 0, 0, 1, 1, 3, 3, 3.0], np.arange(8) * 100
        np.testing.assert_allclose(course(values, steps, sign=1.0, first=2, last=2, segment=(0, 4)), [210, 250, 290])

    def test_a_missing_checkpoint_is_bridged(self):
        values, steps = [0, 0, 0, np.nan, 1, 1, 1.0], np.array([0, 1, 2, 3, 6, 7, 8]) * 100
        found = course(values, steps, sign=1.0, first=2, last=3)
        assert np.isfinite(found).all() and 200 <= found[0] <= found[1] <= found[2] <= 600

    def test_no_movement_has_no_course(self):
        assert np.isnan(course(np.zeros(8), np.arange(8), sign=1.0, first=3, last=3)).all()


def test_precedence_counts_the_same_gap_half():
    steps = np.array([0, 100, 200, 300])
    first, second = np.array([50.0, 110, 210, 120]), np.array([150.0, 190, 110, np.nan])
    # Before; same gap; after; one that does not exist.
    assert probability_of_preceding(first, second, steps) == pytest.approx((1 + 0.5 + 0) / 3)
    assert probability_of_preceding(np.array([np.nan]), np.array([5.0]), steps) is None
    # Reached exactly at a checkpoint: in the gap that ends there.
    assert probability_of_preceding(np.array([100.0]), np.array([101.0]), steps) == 1.0
