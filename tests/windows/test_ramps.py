"""Steady growth told from jumps, on hand-made curves."""

import numpy as np
import pytest

from kvjax.windows.group_shifts import Shift
from kvjax.windows.ramps import find_ramps, is_growth

STEPS = np.arange(1, 41) * 250
NOISE = 0.01  # of a difference of two averages of three


def curve(*, jump=0.0, at=20, ramp=0.0, begins=10, ends=30):
    """Draws a curve with a jump after a checkpoint, and a ramp that rises by so much between two."""
    index = np.arange(40)
    return jump * (index > at) + ramp * np.clip((index - begins) / (ends - begins), 0, 1)


def growth(values, gap, *, first=None, last=None):
    size = float(values[gap + 1 : gap + 4].mean() - values[gap - 2 : gap + 1].mean())
    shift = Shift(0, gap, gap if first is None else first, gap if last is None else last, size, abs(size) / NOISE, 0.5)
    return is_growth(shift, values, STEPS, floor=0.05, threshold=4.75, side=3)


@pytest.mark.parametrize("sign", [1, -1])
def test_samples_of_a_ramp(sign):
    """Three steps of a ramp are growth, however large, and a jump is none; so too downwards."""
    assert growth(sign * curve(ramp=0.8), 20)
    assert growth(sign * curve(ramp=4.0), 20)
    assert not growth(sign * curve(jump=0.3), 20)


def test_jump_beside_a_ramp():
    """A jump out of a ramp counts by what it exceeds the ramp by."""
    assert not growth(curve(jump=0.3, ramp=0.4), 20)
    assert growth(curve(jump=0.03, ramp=0.4), 20)


def test_long_movement():
    """A movement over many checkpoints that stands still before and after is no sample of a longer one."""
    values = curve(ramp=0.8, begins=15, ends=25)
    assert not growth(values, 20, first=15, last=24)


def ramps(*curves, jumps=(), alone=12.0, corroboration=1, floor=0.05):
    values = np.stack(curves, axis=1)
    each = np.ones(values.shape[1])
    settings = {"threshold": 4.75, "alone": alone, "corroboration": corroboration, "side": 3}
    return find_ramps(values, NOISE * each, floor * each, jumps, **settings)


def test_ramp_of_a_run():
    """A ramp is found between the checkpoints where it begins and ends, with its levels."""
    (ramp,) = ramps(curve(ramp=-0.8))
    assert abs(ramp.first - 10) <= 3 and abs(ramp.last - 30) <= 3
    assert (ramp.before, ramp.after) == (pytest.approx(0.0, abs=0.06), pytest.approx(-0.8, abs=0.06))
    assert ramp.score == pytest.approx((ramp.before - ramp.after) / NOISE)


def test_what_is_no_ramp():
    """A flat metric, a jump, a fast rise and growth below twice the floor are no ramps."""
    assert ramps(np.zeros(40), curve(jump=0.5), curve(ramp=0.8, begins=19, ends=22), curve(ramp=0.09)) == []
    jump = Shift(0, 20, 20, 20, 0.5, 40.0, 0.5)
    assert ramps(curve(ramp=0.8, begins=19, ends=24), jumps=[jump]) == []


def test_ramps_that_support_each_other():
    """A weak ramp needs others at the same time; a strong one needs none."""
    weak, elsewhere = curve(ramp=0.11), curve(ramp=0.11, begins=0, ends=9)
    assert ramps(weak, elsewhere, corroboration=2) == []
    assert len(ramps(weak, weak, corroboration=2)) == 2
    assert len(ramps(curve(ramp=0.8), corroboration=2)) == 1


def test_ramp_over_missing_values():
    """A metric without values has no ramp."""
    assert ramps(np.full(40, np.nan), curve(ramp=0.8))[0].metric == 1
