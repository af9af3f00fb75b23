"""The order of metrics over seeds."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.proportion import proportion_confint

from kvjax.compare.order import Onset, consensus_order, precedences, relation


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (Onset(0, 250), Onset(250, 500), "before"),
        (Onset(500, 750), Onset(250, 500), "after"),
        (Onset(250, 500), Onset(250, 500), "undetermined"),
        (Onset(0, 500), Onset(250, 750), "undetermined"),
        (Onset(250, 500), Onset(4000, None), "before"),
        (Onset(4000, None), Onset(250, 500), "after"),
        (Onset(4000, None), Onset(4000, None), "undetermined"),
        (Onset(250, 500), Onset(300, None), "undetermined"),
    ],
)
def test_relation_of_two_onsets(a, b, expected):
    """One precedes the other only if no step could belong to both; a censored onset comes later than its run's end."""
    assert relation(a, b) == expected


def test_precedence_has_a_binomial_interval():
    """Of nine seeds that tell, eight say r before accuracy: the interval is SciPy's Wilson interval."""
    r = [Onset(250, 500)] * 8 + [Onset(750, 1000), Onset(500, 750)]
    accuracy = [Onset(500, 750)] * 8 + [Onset(500, 750), Onset(500, 750)]
    (pair,) = precedences({"answer_accuracy": accuracy, "r": r})
    expected = scipy.stats.binomtest(8, 9).proportion_ci(method="wilson")
    assert (pair.first, pair.before, pair.after, pair.undetermined) == ("r", 8, 1, 1)
    assert (pair.low, pair.high) == pytest.approx((expected.low, expected.high), rel=1e-5)
    assert pair.holds


def test_missing_metric_of_a_seed():
    """A seed without one of the metrics tells nothing about the pair."""
    (pair,) = precedences({"a": [Onset(0, 1), None], "b": [Onset(1, 2), Onset(1, 2)]})
    assert (pair.before, pair.after, pair.undetermined) == (1, 0, 0)
    assert not pair.holds


def test_pair_that_no_seed_decides():
    """If every seed leaves the order open, there is no share."""
    (pair,) = precedences({"a": [Onset(0, 1)] * 5, "b": [Onset(0, 1)] * 5})
    assert (pair.share, pair.low, pair.undetermined) == (None, None, 5)


def test_consensus_of_a_chain():
    """Metrics that always follow each other form a chain; one without a sure place stands with the first."""
    onsets = {
        "c": [Onset(2, 3)] * 5,
        "a": [Onset(0, 1)] * 5,
        "b": [Onset(1, 2)] * 5,
        "x": [Onset(0, 1), Onset(0, 1), Onset(1, 2), Onset(2, 3), Onset(3, None)],
    }
    assert consensus_order(list(onsets), precedences(onsets)) == [["a", "x"], ["b"], ["c"]]


def test_consensus_of_a_circle():
    """Majorities can run in a circle, and then there is no order."""
    onset = {1: Onset(0, 1), 2: Onset(1, 2), 3: Onset(2, 3)}
    orders = [(1, 2, 3), (3, 1, 2), (2, 3, 1)] * 30
    onsets = {name: [onset[order[i]] for order in orders] for i, name in enumerate("abc")}
    assert consensus_order(list(onsets), precedences(onsets)) is None


@pytest.mark.parametrize("seed", range(30))
def test_consensus_agrees_with_networkx(seed):
    """Groups are the generations of the graph of orders that hold; a graph with a circle has none."""
    generator = np.random.default_rng(seed)
    onsets = {name: _drawn(generator, place=i if seed % 2 else 0) for i, name in enumerate("abcde")}
    pairs = precedences(onsets)
    graph = nx.DiGraph([(pair.first, pair.second) for pair in pairs if pair.holds])
    graph.add_nodes_from(onsets)
    found = consensus_order(list(onsets), pairs)
    if nx.is_directed_acyclic_graph(graph):
        assert list(map(set, found)) == list(map(set, nx.topological_generations(graph)))
    else:
        assert found is None


def _drawn(generator, *, place):
    """Draws a metric's onsets in 12 seeds around a place, each between two of 8 checkpoints; some never come."""
    steps = np.clip(np.round(generator.normal(place, 1.0, 12)), 0, 8).astype(int)
    return [Onset(int(step), int(step) + 1 if step < 8 else None) for step in steps]


@pytest.mark.parametrize("seed", range(10))
def test_counts_by_enumeration(seed):
    """Every pair is counted once, seed by seed, and its interval is statsmodels'."""
    generator = np.random.default_rng(seed)
    onsets = {name: _drawn(generator, place=i) for i, name in enumerate("abc")}
    pairs = precedences(onsets)
    assert {frozenset((pair.first, pair.second)) for pair in pairs} == {frozenset(x) for x in ("ab", "ac", "bc")}
    for pair in pairs:
        ends = [(float("inf") if x.by is None else x.by) for x in onsets[pair.first]]
        others = [(float("inf") if x.by is None else x.by) for x in onsets[pair.second]]
        # On a grid of checkpoints two intervals are the same, or one lies wholly before the other.
        assert pair.before == sum(a < b for a, b in zip(ends, others, strict=True))
        assert pair.undetermined == sum(a == b for a, b in zip(ends, others, strict=True))
        if pair.share is not None:
            low, high = proportion_confint(pair.before, pair.before + pair.after, method="wilson")
            assert (pair.low, pair.high) == pytest.approx((low, high), abs=1e-6)
