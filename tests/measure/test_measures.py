"""Measures on arrays small enough to work out by hand."""

import jax.numpy as jnp
import numpy as np

from kvjax.measure.behaviour import (
    answer_correct,
    answer_distribution,
    answer_logits,
    answer_loss,
    answer_margin,
    head_selectivities,
    next_token_sums,
    read_selectivities,
    relation_attention,
    wins_among,
)
from kvjax.measure.between_checkpoints import stays_stable
from kvjax.measure.heads import attention_per_read
from kvjax.measure.residual import cosine_drift, event_drift, lens_per_read, linear_cka
from kvjax.sweeps.fixed_margin import strongest_others
from kvjax.task.encoding import RELATION_GROUPS, TOKEN_ROLES

VALUES = jnp.array([2, 3, 4])


def test_answer_margin():
    """The margin is against the best other value token, not against other tokens."""
    logits = jnp.array([[9.0, 0.0, 2.0, 5.0, 1.0], [0.0, 0.0, 2.0, 5.0, 1.0]])
    answers = jnp.array([3, 2])
    assert answer_margin(logits, answers, VALUES).tolist() == [3.0, -3.0]
    assert wins_among(logits, answers, VALUES).tolist() == [True, False]


def test_tied_logits():
    """The lower id wins a tie, as in an argmax."""
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 3, (200, 6)).astype(np.float32)
    for target in range(6):
        wins = wins_among(jnp.asarray(logits), jnp.full(200, target))
        assert wins.tolist() == (logits.argmax(axis=1) == target).tolist()
    among = wins_among(jnp.asarray(logits), jnp.full(200, 3), VALUES)
    assert among.tolist() == (logits[:, 2:5].argmax(axis=1) == 1).tolist()


def test_answer_accuracy():
    """An answer is right only if it wins over the full vocabulary."""
    logits = jnp.array([[9.0, 0.0, 2.0, 5.0, 1.0], [0.0, 0.0, 2.0, 5.0, 1.0]])
    assert answer_correct(logits, jnp.array([3, 3])).tolist() == [False, True]


def test_answer_entropy():
    """A uniform prediction has the entropy log V and the confidence 1 / V."""
    entropy, confidence = answer_distribution(jnp.zeros((1, 8)), jnp.array([5]))
    np.testing.assert_allclose(entropy, np.log(8), rtol=1e-6)
    np.testing.assert_allclose(confidence, 1 / 8, rtol=1e-6)


def test_loss_and_logit_of_the_answer():
    """The loss is over the vocabulary; the centred logit is against the mean over values alone."""
    logits = jnp.array([[9.0, 0.0, 2.0, 5.0, 2.0]])
    loss = answer_loss(logits, jnp.array([3]))
    np.testing.assert_allclose(loss, [np.log(np.exp(9) + 1 + 2 * np.exp(2) + np.exp(5)) - 5], rtol=1e-6)
    own, centred = answer_logits(logits, jnp.array([3]), VALUES)
    assert own.tolist() == [5.0] and centred.tolist() == [2.0]


def test_strongest_other_value():
    """The competitor is the largest value beside the answer, and the first of equal ones."""
    logits = np.array([[3.0, 5.0, 4.0], [3.0, 5.0, 4.0], [1.0, 1.0, 0.0]])
    assert strongest_others(logits, np.array([1, 0, 2])).tolist() == [2, 1, 0]


def test_targets_of_the_loss():
    """Padding and the first token are no targets."""
    logits = jnp.zeros((1, 4, 5)).at[0, 0, 3].set(100.0)  # sure of token 3 after the first position
    tokens, roles = jnp.array([[1, 3, 2, 0]]), jnp.array([[-1, 2, 6, -1]])
    loss, right = next_token_sums(logits, tokens, roles, num_roles=7)
    np.testing.assert_allclose(loss, [0.0 + np.log(5)], rtol=1e-5)
    assert right.tolist() == [[0, 0, 1, 0, 0, 0, 0]] and len(TOKEN_ROLES) == 7


def test_selectivities_by_hand():
    """Key and recency selectivity of two heads, by hand."""
    # Two heads of one layer, one read. Relations: current, stale, older, other key, the null's key, none.
    pattern = jnp.array([[0.3, 0.2, 0.1, 0.05, 0.15, 0.2], [0.1, 0.1, 0.0, 0.2, 0.4, 0.2]]).reshape(1, 1, 2, 1, 6)
    groups = relation_attention(pattern, jnp.array([1, 2, 3, 4, 5, 0]).reshape(1, 1, 6), RELATION_GROUPS)
    np.testing.assert_allclose(groups["key"].ravel(), [0.6, 0.2], rtol=1e-6)
    np.testing.assert_allclose(groups["value"].ravel(), [0.8, 0.8], rtol=1e-6)
    of_heads = head_selectivities(groups, jnp.array([[True]]))
    np.testing.assert_allclose(of_heads["key"].ravel(), [0.6 / 0.8, 0.2 / 0.8], rtol=1e-6)
    np.testing.assert_allclose(of_heads["key_null"].ravel(), [0.15 / 0.8, 0.4 / 0.8], rtol=1e-6)
    np.testing.assert_allclose(of_heads["recency"].ravel(), [0.3 / 0.6, 0.1 / 0.2], rtol=1e-6)
    of_reads = read_selectivities(of_heads)
    np.testing.assert_allclose(of_reads["key"], [[0.75]], rtol=1e-6)  # the first head's
    np.testing.assert_allclose(of_reads["key_null"], [[0.5]], rtol=1e-6)  # the second's: the null has its own maximum
    np.testing.assert_allclose(of_reads["recency"], [[0.5]], rtol=1e-6)  # the first's
    alone = head_selectivities(groups, jnp.array([[False]]))
    assert np.isnan(read_selectivities(alone)["key_null"]).all(), "no other key was written"


def test_selectivities_without_attention():
    """Selectivities do not exist if no value is attended to."""
    nothing, there = jnp.zeros((1, 1, 2, 1)), jnp.array([[True]])
    groups = dict.fromkeys(("current", "key", "null_key", "value"), nothing)
    found = read_selectivities(head_selectivities(groups, there))
    assert all(np.isnan(x).all() for x in found.values())
    some = jnp.full((1, 1, 2, 1), 0.5)
    found = read_selectivities(head_selectivities(groups | {"value": some}, there))
    assert found["key"].tolist() == [[0.0]] and np.isnan(found["recency"]).all(), "no part of the key to share"


def test_drift():
    """Drift is 0 of parallel states, 2 of opposite ones, and none of a zero state."""
    a = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    b = np.array([[3.0, 0.0], [-2.0, -2.0], [1.0, 0.0]])
    drift = cosine_drift(a, b)
    np.testing.assert_allclose(drift[:2], [0.0, 2.0], atol=1e-12)
    assert np.isnan(drift[2])


def test_lens_by_hand():
    """Logit lens values of three reads in two sequences, by hand."""
    # One stage, two sequences of two reads, the last of which is none; tokens 2-4 are values, 0-1 keys.
    at_prediction = jnp.array([[[[0, 9, 1, 2, 0], [9, 0, 5, 1, 1]], [[1, 0, 0, 0, 7], [0, 0, 0, 9, 0]]]], jnp.float32)
    at_support = jnp.array([[[[0, 0, 0, 3, 1], [0, 0, 1, 0, 0]], [[0, 0, 2, 1, 1], [0, 0, 0, 0, 1]]]], jnp.float32)
    answers, keys = jnp.array([[3, 2], [4, 3]]), jnp.array([[1, 1], [0, 1]])
    found = lens_per_read(at_prediction, at_support, answers, keys, value_ids=VALUES, key_ids=jnp.array([0, 1]))
    reads = {name: x[0].ravel()[:3].tolist() for name, x in found.items()}
    assert reads["answer_correct"] == [True, True, True]  # among values 3 and 2 win, then 4
    assert reads["query_key_correct"] == [True, False, True]  # key 1 wins the first read only, key 0 the third
    assert reads["support_value_correct"] == [True, True, False]
    assert reads["answer_margin"] == [1.0, 4.0, 7.0]


def test_attention_measures_by_hand():
    """Of `bos W key value R key answer` the read predicts at 5; its value is at 3, its key at 2."""
    rows = {3: [0.1, 0.0, 0.6, 0.3, 0, 0, 0], 5: [0.0, 0.0, 0.25, 0.5, 0.0, 0.25, 0]}
    pattern = np.zeros((1, 1, 1, 7, 7), np.float32)
    for position, row in rows.items():
        pattern[0, 0, 0, position] = row
    relations = jnp.array([0, 0, 0, 1, 0, 0, 0]).reshape(1, 1, 7)
    found = attention_per_read(jnp.asarray(pattern), jnp.array([[5]]), jnp.array([[3]]), relations, RELATION_GROUPS)
    expected = {
        "query_attention": 0.25,
        "support_attention": 0.5,
        "current_value_attention": 0.5,
        "stale_attention": 0.0,
        "binding_attention": 0.6,
        "attention_entropy": 0.5 * np.log(4) + 0.5 * np.log(2),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].ravel(), [value], rtol=1e-6)


def test_event_drift_and_cka_by_hand():
    """A right angle, no turn, a rotation of all, and an unrelated direction."""
    # Two events that turn by a right angle and not at all; then a rotation of all, and an unrelated direction.
    a = jnp.array([[[1.0, 0.0], [0.0, 2.0]]])
    b = jnp.array([[[0.0, 3.0], [0.0, 5.0]]])
    np.testing.assert_allclose(event_drift(a, b), [[1.0, 0.0]], atol=1e-6)
    states = jnp.array([[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]])
    counted = jnp.ones((1, 4), bool)  # all of one split
    turned = states @ jnp.array([[0.0, 1.0], [-1.0, 0.0]])
    np.testing.assert_allclose(linear_cka(states, 3 * turned + 7, counted), [1.0, 1.0], rtol=1e-5)
    # The first two events vary along x in one, the last two in the other: half of the variance is shared with none.
    one, other = states * jnp.array([[[1.0, 0.0]]]), states * jnp.array([[[0.0, 1.0]]])
    np.testing.assert_allclose(linear_cka(one, other, counted), [0.0, 0.0], atol=1e-6)
    # <one, states>: cross Gram (2, 0), Grams 2 and diag(2, 2): 4 / (2 · 2√2).
    np.testing.assert_allclose(linear_cka(one, states, counted), [1 / np.sqrt(2)] * 2, rtol=1e-5)


def test_cka_of_splits():
    """CKA over uneven splits, padding and a split without reads equals the textbook's on each and on all together."""
    rng = np.random.default_rng(0)
    counted = np.array([[True] * 9, [True, False] + [True] * 3 + [False] * 4, [False] * 9])
    a, b = rng.normal(size=(2, 3, 9, 4)).astype(np.float32) + rng.normal(size=(2, 3, 1, 4)).astype(np.float32) * 5

    def textbook(x, y):
        x, y = x - x.mean(0), y - y.mean(0)
        return np.sum((x @ x.T) * (y @ y.T)) / np.sqrt(np.sum((x @ x.T) ** 2) * np.sum((y @ y.T) ** 2))

    expected = [textbook(a[counted], b[counted]), *(textbook(a[z][counted[z]], b[z][counted[z]]) for z in range(2))]
    np.testing.assert_allclose(linear_cka(a, b, counted), [*expected, np.nan], rtol=1e-5)


def test_stability():
    """Stability begins with the first checkpoint after which it lasts."""
    assert stays_stable(np.array([True, False, True, True])).tolist() == [False, False, True, True]
    assert stays_stable(np.array([True, False])).tolist() == [False, False]
