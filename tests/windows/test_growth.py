"""Shifts compared with growth over a whole run, on hand-made curves."""

import numpy as np
import pytest

from kvjax.windows.group_shifts import Shift
from kvjax.windows.growth import growing
from kvjax.windows.trajectories import Metric, Trajectories

SPLITS = ("validation_iid", "heldout_pairs", "structural_ood")
NOISE = 0.02


def explained(curves, shifts, *, steps=None, noise=NOISE, known_noise=NOISE):
    """Searches curves of one measure on several splits; `shifts` are (metric, gap), with sizes read off the curves."""
    rng = np.random.default_rng(0)
    values = np.stack(curves, axis=1) + noise * rng.standard_normal((len(curves[0]), len(curves)))
    steps = np.arange(1, len(values) + 1) * 250 if steps is None else np.asarray(steps)
    metrics = tuple(Metric("r", "r", split) for split in SPLITS[: len(curves)])
    run = Trajectories(steps, metrics, values, values[None])

    def made(metric, gap):
        before, after = values[max(0, gap - 2) : gap + 1, metric], values[gap + 1 : gap + 4, metric]
        size = after.mean() - before.mean()
        error = known_noise * np.sqrt(1 / len(before) + 1 / len(after))
        return Shift(metric, gap, gap, gap, float(size), float(abs(size) / error), 0.8)

    every = [made(*shift) for shift in shifts]
    found = growing(every, run, np.full(len(metrics), 0.05), threshold=5.0, side=3)
    return [shift in found for shift in every]


def rise(steps, curve):
    return (curve(np.asarray(steps)) - curve(steps[0])) / (curve(steps[-1]) - curve(steps[0]))


LOG_STEPS = np.array([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "steps", [np.arange(1, 7) * 250, np.arange(1, 9) * 250, LOG_STEPS, [250, 500, 2000, 2250, 9000]]
)
@pytest.mark.parametrize("curve", [np.asarray, np.log1p], ids=["even in steps", "even in log steps"])
def test_growth_over_a_run(steps, curve, sign):
    """A shift in even growth is explained, upwards and downwards, however its checkpoints are spaced."""
    values = sign * rise(steps, curve)
    gap = int(np.argmax(np.abs(np.diff(values))[1:-1])) + 1
    assert explained([values], [(0, gap)], steps=steps) == [True]


@pytest.mark.parametrize("steps", [np.arange(1, 7) * 250, np.arange(1, 9) * 250, LOG_STEPS])
def test_step(steps):
    """A step is not explained, wherever it has two checkpoints or more on each side."""
    for gap in range(1, len(steps) - 2):
        assert explained([1.0 * (np.arange(len(steps)) > gap)], [(0, gap)], steps=steps) == [False], gap


def test_two_steps():
    """Two steps look like growth over the whole run; beside the other, each is a step."""
    index = np.arange(12)
    values = 1.0 * (index > 3) + 1.0 * (index > 7)
    assert explained([values], [(0, 3), (0, 7)]) == [False, False]


def test_steps_where_others_have_them():
    """Two steps of which a trajectory shows one as a shift are told from growth by where other trajectories shift."""
    index = np.arange(12)
    two = 1.0 * (index > 3) + 1.0 * (index > 7)
    late = 1.0 * (index > 7)
    assert explained([two], [(0, 3)], known_noise=0.3) == [True]
    # One other is not enough.
    assert explained([two, late], [(0, 3), (1, 7)], known_noise=0.3)[0]
    assert not explained([two, late, late], [(0, 3), (1, 7), (2, 8)], known_noise=0.3)[0]


def test_growth_of_a_shape_between():
    """Growth that is neither even in steps nor in log steps leaves no step over."""
    index = np.arange(12)
    assert explained([index / 11], [(0, 2)], steps=LOG_STEPS, noise=0.0, known_noise=0.005) == [True]


def test_step_out_of_growth():
    """A step that stands out of growth is one, though growth alone explains more than the step alone."""
    index = np.arange(16)
    assert explained([0.2 * index + 0.4 * (index > 7)], [(0, 7)]) == [False]
    assert explained([0.2 * index + 0.04 * (index > 7)], [(0, 7)]) == [True], "below its floor"


def test_splits_decide_together():
    """What noise does to one split is outvoted by the others, if they shift in the same gap or a touching one."""
    even = np.linspace(0, 1, 8)
    like_a_step = np.array([0.1, 0.1, 0.1, 0.1, 0.9, 0.9, 0.9, 0.9])
    run = [like_a_step, even, even]
    # So noisy that no step could be told from growth in one model with both.
    assert explained(run, [(0, 3)], known_noise=0.2) == [False]
    assert explained(run, [(0, 3), (1, 3), (2, 4)], known_noise=0.2) == [True] * 3
    assert explained(run, [(0, 3), (1, 5), (2, 5)], known_noise=0.2) == [False, True, True]
    assert explained([like_a_step, like_a_step, even], [(0, 3), (1, 3), (2, 3)], known_noise=0.2) == [False] * 3


@pytest.mark.parametrize("gap", [22, 30, 38])
def test_growth_over_a_stretch(gap):
    """On a dense run a gap inside a ramp of 20 checkpoints or at its ends is explained; a movement of 6 is not."""
    index = np.arange(80)
    ramp = np.clip((index - 20) / 20, 0, 1)
    assert explained([ramp], [(0, gap)]) == [True]
    assert explained([np.clip((index - gap + 3) / 6, 0, 1)], [(0, gap)]) == [False]
    beside_a_birth = ramp + 1.0 * (index > 44)
    assert explained([beside_a_birth], [(0, gap), (0, 44)]) == [True, False]
    # A shift far from the stretch has no say.
    assert explained([ramp + 1.0 * (index > 76)], [(0, gap), (0, 76)]) == [True, False]


def test_missing_values():
    """Checkpoints without a value are left out, not taken as steps."""
    values = np.linspace(0, 1, 8)
    values[[0, 3]] = np.nan
    assert explained([values], [(0, 4)]) == [True]
    step = np.where(np.arange(8) > 4, 1.0, 0.0)
    step[[0, 3]] = np.nan
    assert explained([step], [(0, 4)]) == [False]


def test_curves_without_noise():
    """Exact growth is growth and an exact step a step: no residual is divided by zero."""
    assert explained([np.linspace(0, 1, 6)], [(0, 2)], noise=0.0) == [True]
    assert explained([1.0 * (np.arange(6) > 2)], [(0, 2)], noise=0.0) == [False]
