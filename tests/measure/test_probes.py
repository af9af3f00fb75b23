"""Trained probes against scikit-learn's Ridge on the same features."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from kvjax.measure.probes import (
    NO_LABEL,
    RIDGE,
    fit_logistic,
    fit_probes,
    label_wins,
    probe_scores,
    ranks_above,
    ridge_system,
    standardise,
)

ROWS, WIDTH, CLASSES = 300, 24, 7


def features(seed, rows=ROWS):
    """Correlated features with a large mean, one of them constant, as residual streams have them."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(0).normal(size=(5, WIDTH))
    mixed = rng.normal(size=(rows, 5)) @ directions + 0.1 * rng.normal(size=(rows, WIDTH)) + 10
    mixed[:, 3] = 2.5
    return mixed.astype(np.float32)


def scikit_scores(fit, labels, test):
    """One-hot ridge regression in float64; rows without a label are rows of no class."""
    targets = (labels[:, None] == np.arange(CLASSES)).astype(float)
    scaler = StandardScaler().fit(fit.astype(np.float64))
    model = Ridge(alpha=RIDGE * len(fit)).fit(scaler.transform(fit.astype(np.float64)), targets)
    return model.predict(scaler.transform(test.astype(np.float64)))


@pytest.fixture(scope="module")
def fitted():
    rng = np.random.default_rng(1)
    groups = np.stack([features(2), features(3)])
    tests = np.stack([features(4, 50), features(5, 50)])
    labels = np.stack([rng.integers(0, CLASSES, ROWS) for _ in range(3)])
    labels[:, ::9] = NO_LABEL
    system = ridge_system(jnp.asarray(groups), jnp.ones(ROWS))
    probes = fit_probes(system, jnp.asarray(labels), CLASSES)
    return groups, tests, labels, system, probes


def test_ridge_scores(fitted):
    """Ridge probes score as scikit-learn's."""
    groups, tests, labels, system, probes = fitted
    rows = standardise(system, jnp.asarray(tests))
    for g in range(len(groups)):
        for p in range(len(labels)):
            ours = probe_scores(probes.weights[g, p], probes.intercepts[p], rows[g])
            theirs = scikit_scores(groups[g], labels[p], tests[g])
            np.testing.assert_allclose(ours.T, theirs, atol=1e-4)


def test_rows_that_do_not_count(fitted):
    """Rows that do not count change nothing beyond rounding, which the systems blow up by their condition number."""
    groups, _, labels, system, probes = fitted
    longer = np.concatenate([groups, np.full((2, 40, WIDTH), 77.0, np.float32)], axis=1)
    counts = np.concatenate([np.ones(ROWS), np.zeros(40)]).astype(np.float32)
    padded = np.concatenate([labels, np.full((3, 40), NO_LABEL)], axis=1)
    again = fit_probes(ridge_system(jnp.asarray(longer), jnp.asarray(counts)), jnp.asarray(padded), CLASSES)
    for group, penalised in enumerate(system.penalised):
        rounding = np.linalg.cond(penalised) * np.finfo(np.float32).eps * np.abs(probes.weights[group]).max()
        assert rounding < 0.01
        np.testing.assert_allclose(again.weights[group], probes.weights[group], atol=rounding)
    np.testing.assert_allclose(again.intercepts, probes.intercepts, atol=1e-6)


def test_winners_by_hand():
    """The class with the largest score wins, by hand."""
    scores = jnp.array([[0.1, 0.9, 0.2], [0.3, 0.0, 0.2], [0.2, 0.8, 0.1]])  # [classes, rows]
    assert label_wins(scores, jnp.array([1, 2, NO_LABEL])).tolist() == [True, False, False]
    others = jnp.array([2, 1, 0])
    assert ranks_above(scores, jnp.array([1, 2, NO_LABEL]), others).tolist() == [True, True, False]
    assert ranks_above(scores, jnp.array([0, 2, 1]), jnp.array([1, NO_LABEL, 2])).tolist() == [False, False, True]


def test_binary_probe(fitted):
    """The binary probe decides as scikit-learn's Ridge fitted to 1 for the current value and -1 for the stale one."""
    groups, tests, labels, system, probes = fitted
    rows = standardise(system, jnp.asarray(tests))[0]
    current, stale = labels[1], labels[2]  # rows without one have no 1, or no -1
    of_current, of_stale = (probe_scores(probes.weights[0, p], probes.intercepts[p], rows) for p in (1, 2))
    classes = np.arange(CLASSES)
    targets = (current[:, None] == classes).astype(float) - (stale[:, None] == classes)
    scaler = StandardScaler().fit(groups[0].astype(np.float64))
    model = Ridge(alpha=RIDGE * ROWS).fit(scaler.transform(groups[0].astype(np.float64)), targets)
    theirs = model.predict(scaler.transform(tests[0].astype(np.float64)))
    shown = np.random.default_rng(6).permuted(np.tile(classes, (len(theirs), 1)), axis=1)[:, :2]
    lead = np.diff(np.take_along_axis(theirs, shown, axis=1), axis=1)[:, 0]
    ours = ranks_above(of_current, jnp.asarray(shown[:, 1]), jnp.asarray(shown[:, 0]), minus_YxN=of_stale)
    assert (abs(lead) > 1e-4).all() and ours.tolist() == (lead > 0).tolist()


def test_logistic_predictions(fitted):
    """Logistic probes predict as scikit-learn's."""
    groups, tests, labels, system, _ = fitted
    counted = labels[1] != NO_LABEL
    weights, intercepts = fit_logistic(system.features[0], jnp.asarray(labels[1]), CLASSES)
    scaler = StandardScaler().fit(groups[0].astype(np.float64))
    model = LogisticRegression(C=1 / (RIDGE * counted.sum()), max_iter=5000, tol=1e-8)
    model.fit(scaler.transform(groups[0].astype(np.float64))[counted], labels[1][counted])
    rows = standardise(system, jnp.asarray(tests))[0]
    scores = np.asarray(probe_scores(weights, intercepts, rows)).T
    ours = np.exp(scores - scores.max(axis=1, keepdims=True))
    ours /= ours.sum(axis=1, keepdims=True)
    theirs = model.predict_proba(scaler.transform(tests[0].astype(np.float64)))
    np.testing.assert_allclose(ours, theirs, atol=5e-3)
