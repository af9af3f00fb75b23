"""Windows as phases: which belong together, and what is said of each measure."""

import numpy as np

from kvjax.artifacts.birth_windows_schema import TriggerEntry
from kvjax.model.components import all_heads
from kvjax.story.handovers import Span
from kvjax.story.phases import cluster_windows, largest_shifts
from kvjax.story.shares import Shares


def shares_with(carriers):
    """Makes shares of which the given components carry at each checkpoint."""
    carrier = np.zeros((len(carriers), 4), bool)
    for c, own in enumerate(carriers):
        carrier[c, list(own)] = True
    values = np.where(carrier, 0.5, 0.0)
    return Shares(all_heads(1, 4), values, values[None], values, values[None], carrier)


def centres(clusters):
    return [[window.center for window in cluster] for cluster in clusters]


def test_clusters_of_windows():
    """Windows that touch are one phase if the same components carry at their ends; others stay apart."""
    windows = [Span(0, 1, 2, 0), Span(2, 3, 4, 1), Span(4, 5, 6, 2), Span(8, 9, 10, 3)]
    same = shares_with([{0}] * 12)
    assert centres(cluster_windows(windows, same)) == [[1, 3, 5], [9]], "the last window does not touch"
    other = shares_with([{0}] * 5 + [{1, 2}] * 7)
    assert centres(cluster_windows(windows, other)) == [[1, 3], [5], [9]]


def test_carriers_that_mostly_agree():
    """Half of all carriers in common are agreement, fewer are not, and nobody agrees with nobody."""
    windows = [Span(0, 1, 2, 0), Span(2, 3, 4, 1)]
    for after, together in (({0, 1}, True), ({0, 1, 2}, False), (set(), False)):
        shares = shares_with([{0}] * 3 + [after] * 2)
        assert (len(cluster_windows(windows, shares)) == 1) == together
    assert len(cluster_windows(windows, shares_with([set()] * 5))) == 1


def test_largest_shifts():
    """A measure appears once per direction, with its strongest shift; shifts of components are left out."""

    def trigger(metric, size, score):
        kind = metric.partition(".")[0]
        return TriggerEntry(kind=kind, metric=metric, split="validation_iid", step=5, size=size, score=score)

    triggers = [
        trigger("r", 0.2, 6.0),
        trigger("r", 0.4, 9.0),
        trigger("q", -0.3, 8.0),
        trigger("w", 2.0, 12.0),
        trigger("head_accuracy_drop.L0H0", 0.5, 20.0),
    ]
    assert [(one.metric, one.size) for one in largest_shifts(triggers, rises=True)] == [("w", 2.0), ("r", 0.4)]
    assert [(one.metric, one.size) for one in largest_shifts(triggers, rises=False)] == [("q", -0.3)]
