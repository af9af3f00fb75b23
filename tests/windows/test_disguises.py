"""Shifts that are another one in disguise, in hand-made resamples."""

import numpy as np
import pytest

from kvjax.windows.disguises import origins
from kvjax.windows.group_shifts import Shift
from kvjax.windows.trajectories import Metric, Trajectories

SPLIT = "validation_iid"
GAP = 4


def accuracies(rng, resamples=200):
    """Draws answers of 60 sequences to 10 checkpoints, right from the sixth on; returns them and resampling counts."""
    right = np.where(np.arange(10) > GAP, 0.7, 0.02)
    answers = (rng.random((60, 10)) < right).astype(float)
    counts = rng.multinomial(60, np.full(60, 1 / 60), size=resamples)
    return answers, counts / 60


def found(of_metric, counts, *, gaps=None, splits=None, resampled=True):
    """Finds the origins of one shift for each metric, by name: values of sequences [N, C]."""
    splits = splits or [SPLIT] * len(of_metric)
    metrics = tuple(
        Metric(name, name, split, resampled=resampled) for name, split in zip(of_metric, splits, strict=True)
    )
    values = np.stack([values.mean(axis=0) for values in of_metric.values()], axis=1)
    samples = np.stack([counts @ values for values in of_metric.values()], axis=2)
    run = Trajectories(np.arange(10) * 100, metrics, values, samples)
    gaps = gaps or [GAP] * len(metrics)
    shifts = [Shift(m, gap, gap, gap, 0.5, 9.0, 0.9) for m, gap in enumerate(gaps)]
    names = list(of_metric)
    return {names[shift.metric]: names[origin.metric] for shift, origin in origins(shifts, run, side=3).items()}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_drop_without_which_nothing_is_right(rng):
    """The drop of a component is accuracy itself if guessing remains; it is not if half of the answers remain."""
    right, counts = accuracies(rng)
    guesses = (rng.random(right.shape) < 0.01).astype(float)
    needed, helpful = right - guesses, right * (rng.random(right.shape) < 0.3)
    drops = {"answer_accuracy": right, "all": right, "needed": needed, "helpful": helpful}
    assert found(drops, counts) == {
        "answer_accuracy": "answer_accuracy",
        "all": "answer_accuracy",
        "needed": "answer_accuracy",
        "helpful": "helpful",
    }


def test_opposite_of_a_measure(rng):
    """A measure that falls as another rises, by the same noise, repeats it."""
    right, counts = accuracies(rng)
    assert found({"w": right, "loss": 3 - 2 * right}, counts)["loss"] == "w"


def test_measures_that_move_at_once(rng):
    """Measures that move at one gap, each by reads of its own, are two pieces of evidence."""
    (right, counts), (other, _) = accuracies(rng), accuracies(rng)
    assert found({"answer_accuracy": right, "r": other}, counts)["r"] == "r"


def test_repetitions_elsewhere(rng):
    """Shifts on other splits or at gaps apart repeat nothing, nor do metrics without resamples."""
    right, counts = accuracies(rng)
    both = {"answer_accuracy": right, "drop": right}
    assert found(both, counts, splits=[SPLIT, "heldout_pairs"])["drop"] == "drop"
    assert found(both, counts, gaps=[GAP, GAP + 2])["drop"] == "drop"
    assert found(both, counts, gaps=[GAP, GAP + 1])["drop"] == "answer_accuracy"
    assert found(both, counts, resampled=False)["drop"] == "drop"


def test_resamples_that_do_not_vary(rng):
    """Where all sequences agree, only trajectories equal in every value are the same."""
    steps = np.where(np.arange(10) > GAP, 1.0, 0.0)
    exact = np.tile(steps, (60, 1))
    less = np.tile(np.where(steps > 0, 0.9, 0.0), (60, 1))
    _, counts = accuracies(rng)
    assert found({"answer_accuracy": exact, "drop": exact, "r": less}, counts) == {
        "answer_accuracy": "answer_accuracy",
        "drop": "answer_accuracy",
        "r": "r",
    }
