"""Accuracy by split and by distance, counted by hand."""

import numpy as np
import pytest
import xarray as xr

from kvjax.measure.uncertainty import resample_counts
from kvjax.story.behaviour import accuracy_by_distance, share_change, split_accuracies


def events_of(accuracy_by_distance, *, sequences=40, split="validation_iid"):
    """Makes streams with one read of each distance, answered right in the given share of them, at two checkpoints."""
    distances = sorted(accuracy_by_distance)
    right = np.zeros((2, sequences, len(distances)), np.float32)
    for d, distance in enumerate(distances):
        for c, accuracy in enumerate(accuracy_by_distance[distance]):
            right[c, : round(accuracy * sequences), d] = 1
    shape = (sequences, len(distances))
    return xr.Dataset(
        {
            "is_read": (("sequence", "read"), np.ones(shape, bool)),
            "split": (("sequence",), [split] * sequences),
            "read_correct": (("step", "sequence", "read"), right),
            "tokens_since_support": (("sequence", "read"), np.broadcast_to(distances, shape)),
        }
    )


def reach_of(accuracies, answers=(True, True)):
    events = events_of(accuracies)
    counts = resample_counts(np.zeros(events.sizes["sequence"], int), resamples=100)
    found = accuracy_by_distance(events, counts, "validation_iid")
    return found.reach(0, 1, answers_C=np.array(answers))


def test_range_of_answers():
    """The range ends before the first distance at which accuracy is below half of the best."""
    reach = reach_of({6: (0.5, 0.9), 9: (0.9, 1.0), 12: (0.2, 0.6), 15: (0.6, 0.55)})
    assert (reach.before, reach.after, reach.longest) == (9, 15, 15)
    assert reach.after_interval[1] == 15 and reach.before_interval[0] in (6, 9)
    nearest = reach.distances[0]
    assert (nearest.tokens, nearest.reads, nearest.before, nearest.after) == ((6, 6), 40, 0.5, pytest.approx(0.9))


def test_range_that_begins_later():
    """Near reads may be the hard ones: the range begins at the first distance that is answered."""
    assert reach_of({6: (0.1, 0.1), 9: (0.9, 0.9), 12: (0.1, 0.9)}).before == 9


def test_range_without_carriers():
    """At a checkpoint that nothing carries there is no range."""
    reach = reach_of({6: (0.5, 0.9), 9: (0.9, 1.0)}, answers=(False, True))
    assert reach.before is None and reach.before_interval is None and reach.after == 9


def test_rare_distances():
    """Distances with few reads are joined with their neighbours, the last with the one before."""
    events = events_of({6: (0.5, 0.5), 9: (0.5, 0.5), 12: (0.5, 0.5), 15: (0.5, 0.5)}, sequences=12)
    counts = resample_counts(np.zeros(12, int), resamples=10)
    found = accuracy_by_distance(events, counts, "validation_iid")
    assert found.ranges == ((6, 9), (12, 15)) and found.reads == (24, 24)
    three = events.isel(read=slice(0, 3))
    assert accuracy_by_distance(three, counts, "validation_iid").ranges == ((6, 12),)
    assert accuracy_by_distance(events.isel(read=slice(0, 1)), counts, "validation_iid") is None
    assert accuracy_by_distance(events, counts, "heldout_pairs") is None


def test_change_of_accuracy():
    """A change holds if its interval leaves out 0; equal checkpoints do not change."""
    events = events_of({6: (0.2, 0.8)})
    counts = resample_counts(np.zeros(40, int), resamples=200)
    accuracy = split_accuracies(events, counts)["validation_iid"]
    change = accuracy.change(0, 1)
    assert change.change == pytest.approx(0.6) and change.holds and change.interval[0] > 0.4
    assert change.before == pytest.approx(0.2) and change.before_interval[0] < 0.2 < change.before_interval[1]
    assert not accuracy.change(1, 1).holds


def test_change_of_a_share():
    """It compares a checkpoint with the mean of later ones, each resample with itself; no carriers, no share."""
    values = np.array([0.8, np.nan, 0.2, 0.4])
    samples = np.array([[0.7, np.nan, 0.1, 0.3], [0.9, np.nan, 0.3, 0.5]] * 50)
    change = share_change(values, samples, 0, np.array([2, 3]))
    assert (change.before, change.after, change.change) == pytest.approx((0.8, 0.3, -0.5))
    assert change.interval == pytest.approx((-0.5, -0.5))
    nothing = share_change(values, samples, 1, np.array([2]))
    assert nothing.before is None and nothing.change is None and nothing.interval is None
