"""Scores of level shifts on trajectories whose answer is known by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.windows.shift_scores import (
    MetricTraits,
    ShiftSettings,
    level_shifts,
    shift_scores,
    steady_drift,
    wobble_variance,
)

SETTINGS = ShiftSettings(
    side=3, min_side=2, jump_share=0.2, wobble_lags=(1, 2, 3), wobble_radius=12, prior_weight=4.0, threshold=4.75
)


def traits(m, *, floor=0.05, wobble=0.02, direction=0.0):
    return MetricTraits(
        floor=jnp.full(m, floor), wobble=jnp.full(m, wobble), direction=jnp.full(m, direction), pooling=jnp.eye(m)
    )


def scores(values_CxM, steps=None, samples=None, settings=SETTINGS, **of_metrics):
    values = jnp.asarray(values_CxM, jnp.float32)
    steps = jnp.arange(len(values)) * 100.0 if steps is None else jnp.asarray(steps, jnp.float32)
    samples = jnp.broadcast_to(values, (4, *values.shape)) if samples is None else jnp.asarray(samples, jnp.float32)
    found = shift_scores(values, samples, steps, traits(values.shape[1], **of_metrics), settings=settings)
    return jax.tree.map(np.asarray, found)


def column(*values):
    return np.array(values, float)[:, None]


def test_level_shift_by_hand():
    """Sizes are averages after minus averages before, of fewer checkpoints at the edges."""
    shift, n_before, n_after = level_shifts(jnp.asarray(column(1, 2, 3, 10, 20, 60)), side=3)
    np.testing.assert_allclose(shift[:, 0], [5 - 1, 11 - 1.5, 30 - 2, 40 - 5, 60 - 11])
    assert n_before[:, 0].tolist() == [1, 2, 3, 3, 3] and n_after[:, 0].tolist() == [3, 3, 3, 2, 1]


def test_level_shift_with_missing_values():
    """A missing value counts on neither side."""
    shift, n_before, _ = level_shifts(jnp.asarray(column(1, np.nan, 3, 10, 20, 60)), side=3)
    assert float(shift[2, 0]) == 30 - 2 and int(n_before[2, 0]) == 2


def test_step():
    """A step holds at its own gap alone."""
    found = scores(column(0, 0, 0, 0, 1, 1, 1, 1))
    assert np.flatnonzero(found.holds[:, 0]).tolist() == [3]
    assert found.size[3, 0] == pytest.approx(1.0)


@pytest.mark.parametrize("at", range(9))
def test_spike(at):
    """A spike holds at no gap, at whichever checkpoint it is."""
    values = np.zeros((9, 1))
    values[at] = 5.0
    assert not scores(values).holds.any()


def test_directions_and_floor():
    """A shift in the wrong direction or below the floor does not hold."""
    rise, fall = column(0, 0, 0, 1, 1, 1), column(1, 1, 1, 0, 0, 0)
    assert scores(rise, direction=1.0).holds.any() and not scores(fall, direction=1.0).holds.any()
    assert scores(fall, direction=-1.0).holds.any() and not scores(rise, direction=-1.0).holds.any()
    assert scores(fall).holds.any() and scores(fall).size[2, 0] == pytest.approx(-1.0)
    assert not scores(rise, floor=1.01).holds.any()


def test_gaps_at_the_edges():
    """Gaps without enough checkpoints on a side have no score."""
    found = scores(column(0, 1, 1, 1, 1, 2))
    assert np.isnan(found.score[[0, 4], 0]).all() and not found.holds[[0, 4]].any()


def test_ramp_with_missing_steps():
    """A ramp is not a shift, however steep and however many of its steps are missing."""
    steps = np.array([0, 100, 200, 300, 2000, 2100, 2200, 2300, 2400])
    assert not scores(0.01 * steps[:, None], steps=steps).holds.any()
    # By index, not by step, the same values jump where checkpoints are missing.
    assert scores(0.01 * steps[:, None]).holds.any()


def test_step_on_a_ramp():
    """A step on a ramp keeps its own size."""
    steps = np.arange(20) * 50.0
    values = 0.002 * steps + (steps >= 500)
    found = scores(values[:, None], steps=steps)
    assert np.flatnonzero(found.holds[:, 0]).tolist() == [9]
    assert found.size[9, 0] == pytest.approx(1.0, abs=1e-4)


def test_steady_drift():
    """A step between two flat stretches has no steady drift; a ramp has its slope."""
    steps = jnp.arange(10) * 10.0
    assert float(steady_drift(jnp.asarray(column(*[0] * 5, *[1] * 5)), steps)[0]) == 0.0
    assert float(steady_drift(3.0 * steps[:, None], steps)[0]) == pytest.approx(3.0)


def wobble(values, steps=None, settings=SETTINGS, shifted=None, of_metrics=None):
    values = jnp.asarray(values, jnp.float32)
    steps = jnp.arange(len(values)) * 1.0 if steps is None else jnp.asarray(steps, jnp.float32)
    shifted = jnp.zeros((len(values) - 1, values.shape[1]), bool) if shifted is None else jnp.asarray(shifted)
    of_metrics = traits(values.shape[1]) if of_metrics is None else of_metrics
    compiled = jax.jit(wobble_variance, static_argnames="settings")
    return np.sqrt(np.asarray(compiled(values, steps, shifted, of_metrics, settings=settings)))


def test_wobble_of_white_noise():
    """The wobble of white noise is its standard deviation, at even and uneven steps."""
    rng = np.random.default_rng(0)
    noise = 0.3 * rng.standard_normal((120, 100))
    settings = dataclasses.replace(SETTINGS, wobble_lags=(1,), wobble_radius=400, prior_weight=1e-6)
    found = wobble(noise, np.cumsum(rng.integers(1, 20, 120)), settings)
    assert found.mean() == pytest.approx(0.3, rel=0.05)


def test_wobble_beside_steps():
    """Wobble counts neither the gap's own step nor a known one."""
    # Values alternate by 0.1 around two levels: the deviation from the neighbours' line is 0.1 / sqrt(1.5).
    values = 0.05 * (-1.0) ** np.arange(24)[:, None]
    values[12:] += 1.0
    values[15:] += 1.0
    shifted = np.zeros((23, 1), bool)
    settings = dataclasses.replace(SETTINGS, wobble_lags=(1,), prior_weight=1e-6, wobble_radius=2)
    known = wobble(values, settings=settings, shifted=shifted | (np.arange(23) == 14)[:, None])[11, 0]
    assert known == pytest.approx(1.4826 * 0.1 / np.sqrt(1.5), rel=1e-4)
    assert wobble(values, settings=dataclasses.replace(settings, wobble_radius=3), shifted=shifted)[13, 0] > 2 * known


def test_expected_wobble():
    """With few checkpoints the expected wobble stands; many quiet ones lower it."""
    assert wobble(np.zeros((4, 1)))[1, 0] == pytest.approx(0.02)
    many = wobble(np.zeros((40, 1)))[20, 0]
    # 4 expected observations of 0.02 beside 0.37 of each of the 24, 21 or 18 seen at a lag: the fewest decide.
    assert 0.02 * np.sqrt(4 / (4 + 0.37 * 24)) < many < 0.02 * np.sqrt(4 / (4 + 0.37 * 15))


def test_pooled_wobble():
    """Wobble is pooled over the splits of a measure."""
    rng = np.random.default_rng(1)
    values = np.stack([np.zeros(40), 0.5 * rng.standard_normal(40)], axis=1)
    together = traits(2).replace(pooling=jnp.full((2, 2), 0.5))
    assert (wobble(values, of_metrics=together)[:, 0] > 5 * wobble(values)[:, 0]).all()


def test_two_shifts():
    """A first shift does not count as the wobble of a second."""
    # Alone in its run, either step has the same score: neither is the other's wobble.
    both, second = (np.zeros((12, 1)), np.zeros((12, 1)))
    both[3:] += 1.0
    both[7:] += 0.3
    second[7:] += 0.3
    found = scores(both)
    assert np.flatnonzero(found.holds[:, 0]).tolist() == [2, 6]
    assert found.score[6, 0] == pytest.approx(scores(second).score[6, 0], rel=0.25)


def test_noise_from_paired_resamples():
    """Noise is the sampling deviation if that exceeds the wobble."""
    values = column(0, 0, 0, 1, 1, 1)
    after = (np.arange(6) >= 3)[:, None]
    # The shift itself differs between resamples: 0.5 or 1.5.
    samples = np.stack([values * (1 + sign * 0.5 * after) for sign in (-1, 1)] * 10)
    found = scores(values, samples=samples)
    assert found.score[2, 0] == pytest.approx(1.0 / 0.5, rel=1e-5)
    # What is common to all checkpoints of a resample cancels: pairs.
    offsets = np.stack([values + offset for offset in (-3.0, 3.0)] * 10)
    assert scores(values, samples=offsets).score[2, 0] == pytest.approx(scores(values).score[2, 0], rel=1e-4)


def test_padded_run():
    """A padded run has the scores that it has without its padding, and no shift in it."""
    rng = np.random.default_rng(2)
    for _ in range(3):
        values = rng.standard_normal((12, 5)).astype(np.float32).cumsum(axis=0)
        samples = values + 0.1 * rng.standard_normal((6, 12, 5)).astype(np.float32)
        steps = np.cumsum(rng.integers(1, 9, 12)).astype(np.float32)
        alone = scores(values, steps=steps, samples=samples)
        padded = scores(
            np.pad(values, ((0, 4), (0, 0)), constant_values=np.nan),
            steps=np.append(steps, steps[-1] + np.arange(1, 5)),
            samples=np.pad(samples, ((0, 0), (0, 4), (0, 0)), constant_values=np.nan),
        )
        for name in ("size", "score", "holds"):
            np.testing.assert_allclose(getattr(padded, name)[:11], getattr(alone, name), rtol=1e-4, atol=1e-5)
        assert not padded.holds[11:].any()
