"""Matching of heads by role, on planted circuits, decoys and noise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kvjax.compare.matching import RoleEvidence, match_runs, role_scores

LAYERS = np.repeat(np.arange(3), 4)
ROLES = ("binder", "retriever")


def planted(binder: int, retriever: int, *, seed: int, decoy: int | None = None) -> RoleEvidence:
    """A run of 12 heads whose two roles are carried by the named heads; a decoy attends and has no effect."""
    generator = np.random.default_rng(seed)
    attention = {role: generator.uniform(0.0, 0.2, 12) for role in ROLES}
    effects = {role: generator.uniform(0.0, 0.02, 12) for role in ROLES}
    attention["binder"][binder] = attention["retriever"][retriever] = 0.9
    effects["binder"][binder], effects["retriever"][retriever] = 0.5, 0.6
    if decoy is not None:
        attention["retriever"][decoy], effects["retriever"][decoy] = 0.95, 0.0
    return RoleEvidence(attention, effects)


def match(one: RoleEvidence, other: RoleEvidence, layers=LAYERS, *, within_layers: bool, draws: int):
    return match_runs([one, other], layers, within_layers=within_layers, draws=draws).pairs[0, 1]


def noise(seed: int) -> RoleEvidence:
    """A run in which attention and effects have nothing to do with each other."""
    generator = np.random.default_rng(seed)
    return RoleEvidence(
        {role: generator.uniform(0, 1, 12) for role in ROLES},
        {role: generator.exponential(1.0, 12) * (generator.random(12) < 0.6) for role in ROLES},
    )


def test_scores_by_hand():
    """A score is attention times the share of positive effects; a missing or negative effect is none."""
    evidence = RoleEvidence({"binder": np.array([0.5, 1.0, 1.0, 0.8])}, {"binder": np.array([0.6, 0.2, -1.0, np.nan])})
    np.testing.assert_allclose(role_scores(evidence)[:, 0], [0.375, 0.25, 0.0, 0.0])


def test_match_is_the_best_of_all():
    """The match has the largest overlap of all permutations of five heads."""
    generator = np.random.default_rng(3)
    one, other = (
        RoleEvidence({r: generator.random(5) for r in ROLES}, {r: generator.random(5) for r in ROLES}) for _ in range(2)
    )
    found = match(one, other, np.zeros(5, int), within_layers=False, draws=1)
    a, b = role_scores(one), role_scores(other)
    best = max(np.minimum(a, b[list(order)]).sum() for order in itertools.permutations(range(5)))
    assert found.overlap.sum() == pytest.approx(best, abs=1e-8)


def test_role_that_moves_within_its_layer():
    """The binder is L0H3 in one run and L0H1 in the other: matched, and beyond the null, at another address."""
    found = match(planted(3, 6, seed=1), planted(1, 5, seed=2), within_layers=True, draws=200)
    assert (found.heads[3], found.heads[6]) == (1, 5)
    assert found.similarity.observed > found.similarity.null.high
    assert found.similarity.null.probability < 0.05
    assert found.address.observed < 0.2


def test_role_that_changes_layers():
    """Free matching follows a retriever from layer 1 to layer 2, which matching within layers cannot."""
    one, other = planted(3, 6, seed=1), planted(3, 10, seed=2)
    free = match(one, other, within_layers=False, draws=200)
    bound = match(one, other, within_layers=True, draws=200)
    assert free.heads[6] == 10
    assert free.similarity.observed > bound.similarity.observed


def test_role_that_keeps_its_address():
    """Heads that keep their addresses give a stability far above that of random addresses."""
    found = match(planted(3, 6, seed=1), planted(3, 6, seed=2), within_layers=True, draws=200)
    assert found.address.observed > 0.8
    assert found.address.observed > found.address.null.high
    assert found.address.null.mean == pytest.approx(0.25, abs=0.1)


def test_decoy_is_not_matched():
    """A head that attends like the retriever, without a causal part, is not taken for it."""
    found = match(planted(3, 6, seed=1), planted(3, 5, seed=2, decoy=6), within_layers=True, draws=1)
    assert found.heads[6] == 5


def test_runs_without_a_circuit():
    """Of pairs of runs without a circuit about 5 % pass the null's 95th percentile, as chance has it."""
    passed = [
        found.similarity.observed > found.similarity.null.high
        for found in (match(noise(2 * i), noise(2 * i + 1), within_layers=True, draws=40) for i in range(60))
    ]
    assert sum(passed) <= 8  # 5 % of 60; 9 or more have probability 0.003


def test_runs_without_any_score():
    """Runs in which no head has an effect match nothing."""
    silent = RoleEvidence({r: np.full(12, 0.5) for r in ROLES}, {r: np.zeros(12) for r in ROLES})
    found = match(silent, silent, within_layers=True, draws=10)
    assert found.similarity.observed == 0
    assert np.isnan(found.address.observed)
    assert not (found.heads == np.arange(12)).any()


def test_runs_of_other_shapes():
    """Runs with other heads cannot be matched."""
    with pytest.raises(ValueError, match="same heads"):
        match(noise(0), planted(3, 6, seed=1), np.zeros(4, int), within_layers=False, draws=1)


def test_stability_over_five_seeds():
    """Five seeds with the same circuit at random addresses: stable roles, and addresses as chance gives them."""
    generator = np.random.default_rng(4)
    runs = [planted(int(generator.integers(4)), 4 + int(generator.integers(4)), seed=i) for i in range(5)]
    found = match_runs(runs, LAYERS, within_layers=True, draws=200)
    assert len(found.pairs) == 10
    assert found.similarity.observed == pytest.approx(
        np.mean([one.similarity.observed for one in found.pairs.values()])
    )
    assert found.similarity.null.probability < 0.01
    assert found.address.null.probability > 0.05
    again = match_runs(runs, LAYERS, within_layers=True, draws=200)
    assert again.similarity == found.similarity


def test_stability_without_a_circuit():
    """Of groups of three runs without a circuit about 5 % have roles that look stable."""
    found = [
        match_runs([noise(3 * i + j) for j in range(3)], LAYERS, within_layers=True, draws=30).similarity
        for i in range(40)
    ]
    assert sum(one.null.probability < 0.05 for one in found) <= 6  # 5 % of 40; 7 or more have probability 0.003


def small(seed: int, count: int) -> RoleEvidence:
    generator = np.random.default_rng(seed)
    return RoleEvidence(
        {role: generator.random(count) for role in ROLES}, {role: generator.exponential(1.0, count) for role in ROLES}
    )


@pytest.mark.parametrize("within", [False, True])
def test_match_agrees_with_enumeration(within):
    """Of all permutations of six heads, those that keep layers if asked, the match has the largest overlap."""
    layers = np.repeat(np.arange(2), 3)
    for seed in range(5):
        one, other = small(2 * seed, 6), small(2 * seed + 1, 6)
        a, b = role_scores(one), role_scores(other)
        allowed = [
            list(order)
            for order in itertools.permutations(range(6))
            if not within or (layers[list(order)] == layers).all()
        ]
        best = max(np.minimum(a, b[order]).sum() for order in allowed)
        found = match(one, other, layers, within_layers=within, draws=1)
        assert found.overlap.sum() == pytest.approx(best, abs=1e-8)


def exact_similarity(one: RoleEvidence, other: RoleEvidence) -> float:
    """The largest overlap over what either has, by trying all permutations."""
    a, b = role_scores(one), role_scores(other)
    orders = itertools.permutations(range(len(a)))
    overlap = max(np.minimum(a, b[list(order)]).sum() for order in orders)
    return overlap / (a.sum() + b.sum() - overlap)


def permuted(run: RoleEvidence, order) -> RoleEvidence:
    return RoleEvidence(run.attention, {role: values[list(order)] for role, values in run.effects.items()})


@pytest.mark.parametrize("seed", range(4))
def test_null_of_similarity_agrees_with_all_permutations(seed):
    """Four heads have 24 orders of effects a run: the null's mean, percentile and probability are of all 576 pairs.

    A role's effects move together with the other's, as in `match_runs`. The Monte Carlo probability counts the observed
    value as one more draw.
    """
    one, other = small(2 * seed, 4), small(2 * seed + 1, 4)
    orders = list(itertools.permutations(range(4)))
    exact = np.array([exact_similarity(permuted(one, p), permuted(other, q)) for p in orders for q in orders])
    draws = 2000
    found = match(one, other, np.zeros(4, int), within_layers=False, draws=draws).similarity
    assert found.observed == pytest.approx(exact_similarity(one, other), abs=1e-8)
    assert found.null.mean == pytest.approx(exact.mean(), abs=4 * exact.std() / np.sqrt(draws))
    share = np.mean(exact >= found.observed - 1e-9)
    error = np.sqrt(share * (1 - share) / draws)
    assert found.null.probability == pytest.approx(share, abs=4 * error + 2 / draws)
    below, above = np.percentile(exact, [93, 97])
    assert below - 1e-9 <= found.null.high <= above + 1e-9


@pytest.mark.parametrize("within", [False, True])
def test_null_of_addresses_agrees_with_all_permutations(within):
    """Random addresses of six heads keep a matched pair with chance 1/6, or 1/3 within layers of three.

    By symmetry it is enough to move one run's addresses: all of its permutations are tried.
    """
    layers = np.repeat(np.arange(2), 3)
    one, other = small(0, 6), small(1, 6)
    found = match(one, other, layers, within_layers=within, draws=2000)
    moves = [
        np.array(order)
        for order in itertools.permutations(range(6))
        if not within or (layers[list(order)] == layers).all()
    ]
    exact = np.array([found.overlap[found.heads == move].sum() for move in moves]) / found.overlap.sum()
    assert exact.mean() == pytest.approx(1 / 3 if within else 1 / 6)
    assert found.address.null.mean == pytest.approx(exact.mean(), abs=4 * exact.std() / np.sqrt(2000))
    share = np.mean(exact >= found.address.observed - 1e-9)
    assert found.address.null.probability == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 2000) + 1e-3)
    assert found.address.observed == pytest.approx(
        found.overlap[found.heads == np.arange(6)].sum() / found.overlap.sum()
    )


def test_null_of_three_runs_permutes_each_once():
    """The mean over pairs has the null of means: three heads, all 216 orders of effects of three runs."""
    runs = [small(seed, 3) for seed in range(3)]
    orders = list(itertools.permutations(range(3)))
    between = {
        (a, b): {(p, q): exact_similarity(permuted(runs[a], p), permuted(runs[b], q)) for p in orders for q in orders}
        for a, b in itertools.combinations(range(3), 2)
    }
    exact = np.array(
        [
            np.mean([between[a, b][chosen[a], chosen[b]] for a, b in between])
            for chosen in itertools.product(orders, repeat=3)
        ]
    )
    found = match_runs(runs, np.zeros(3, int), within_layers=False, draws=2000).similarity
    assert found.null.mean == pytest.approx(exact.mean(), abs=4 * exact.std() / np.sqrt(2000))
    share = np.mean(exact >= found.observed - 1e-9)
    assert found.null.probability == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 2000) + 1e-3)
