"""Measures behaviour: how the logits rank the answers and all other tokens (docs/definitions.md, "Behaviour")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

SELECTIVITY_FLOOR = 1e-6


def wins_among(logits: jax.Array, targets: jax.Array, ids: jax.Array | None = None) -> jax.Array:
    """Checks whether the argmax over some tokens is the target, bool [...].

    Maxima are several times faster on a CPU than an argmax. Ties go to the lower id, as with an argmax.

    Args:
      logits: [..., V].
      targets: [...] token ids, among `ids`.
      ids: token ids that compete; the whole vocabulary if None.
    """
    vocabulary = _expand(jnp.arange(logits.shape[-1]), targets)
    competing = True if ids is None else _expand(_is_member(logits.shape[-1], ids), targets)
    target = targets[..., None]
    own = jnp.max(jnp.where(vocabulary == target, logits, -jnp.inf), axis=-1)
    before = jnp.max(jnp.where(competing & (vocabulary < target), logits, -jnp.inf), axis=-1)
    after = jnp.max(jnp.where(competing & (vocabulary > target), logits, -jnp.inf), axis=-1)
    return (own > before) & (own >= after)


def answer_margin(logits: jax.Array, answers: jax.Array, value_ids: jax.Array) -> jax.Array:
    """Computes logit(answer) - max logit of the other value tokens, [...] in logits.

    Args:
      logits: [..., V] at the prediction positions.
      answers: [...] token ids of the right answers.
      value_ids: [values] token ids of all values.
    """
    vocabulary = _expand(jnp.arange(logits.shape[-1]), answers)
    is_value = _expand(_is_member(logits.shape[-1], value_ids), answers)
    is_answer = vocabulary == answers[..., None]
    right = jnp.max(jnp.where(is_answer, logits, -jnp.inf), axis=-1)
    return right - jnp.max(jnp.where(is_value & ~is_answer, logits, -jnp.inf), axis=-1)


def answer_correct(logits: jax.Array, answers: jax.Array) -> jax.Array:
    """Checks whether the argmax over the full vocabulary is the answer, bool [...]."""
    return wins_among(logits, answers)


def _is_member(size: int, ids: np.ndarray) -> np.ndarray:
    return np.isin(np.arange(size), ids)  # known before the program runs: a constant of it


def _expand(x_V: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.expand_dims(x_V, tuple(range(like.ndim)))


def answer_distribution(logits: jax.Array, answers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes the prediction's entropy (nats, full vocabulary) and the answer's probability, [...] each."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(log_probs)
    entropy = -jnp.sum(probs * log_probs, axis=-1)
    return entropy, jnp.take_along_axis(probs, answers[..., None], axis=-1)[..., 0]


def answer_loss(logits: jax.Array, answers: jax.Array) -> jax.Array:
    """Computes -log of the answer's probability over the full vocabulary, [...] in nats."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(log_probs, answers[..., None], axis=-1)[..., 0]


def answer_logits(logits: jax.Array, answers: jax.Array, value_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Takes the answer's logit, and that minus the mean logit over the value tokens, [...] each.

    Args:
      logits: [..., V] at the prediction positions.
      answers: [...] token ids of the right answers.
      value_ids: [values] token ids of all values.
    """
    own = jnp.take_along_axis(logits, answers[..., None], axis=-1)[..., 0]
    is_value = _expand(_is_member(logits.shape[-1], value_ids), answers)
    return own, own - jnp.sum(jnp.where(is_value, logits, 0.0), axis=-1) / len(value_ids)


def next_token_sums(
    logits_BxTxV: jax.Array, tokens_BxT: jax.Array, token_roles_BxT: jax.Array, *, num_roles: int
) -> tuple[jax.Array, jax.Array]:
    """Sums cross-entropy and right predictions over all non-pad targets of a sequence.

    Args:
      logits_BxTxV: at every position; those at t predict token t + 1.
      tokens_BxT: token ids.
      token_roles_BxT: the role of each token, negative if it is no target.
      num_roles: how many roles there are.

    Returns:
      The summed cross-entropy in nats, [B]; and the number of targets predicted right by role, [B, roles].
    """
    log_probs = jax.nn.log_softmax(logits_BxTxV[:, :-1], axis=-1)
    targets, roles = tokens_BxT[:, 1:], token_roles_BxT[:, 1:]
    loss = -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    right = wins_among(logits_BxTxV[:, :-1], targets)
    by_role = (roles[..., None] == np.arange(num_roles)[None, None]) & right[..., None]
    return jnp.sum(jnp.where(roles >= 0, loss, 0.0), axis=1), jnp.sum(by_role, axis=1)


def relation_attention(
    pattern_LxBxHxQxT: jax.Array, relations_BxQxT: jax.Array, groups: Mapping[str, Sequence[int]]
) -> dict[str, jax.Array]:
    """Sums each head's attention from p_e to the positions of each group of relations to the read, [L, B, H, Q] each.

    Args:
      pattern_LxBxHxQxT: attention probabilities at p_e.
      relations_BxQxT: the relation of each position to each read.
      groups: name -> the relations that are summed.
    """
    member = jnp.stack([jnp.isin(relations_BxQxT, jnp.array(group)) for group in groups.values()], axis=-1)
    # A sum of products, not a matmul: each is one pass over the pattern, in full float32 on every device.
    sums = jnp.sum(pattern_LxBxHxQxT[..., None] * member[None, :, None], axis=-2)
    return {name: sums[..., index] for index, name in enumerate(groups)}


def head_selectivities(groups: Mapping[str, jax.Array], has_null_BxQ: jax.Array) -> dict[str, jax.Array]:
    """Computes the selectivities of every head at every read, [L, B, H, Q] each; NaN if a denominator is below 1e-6.

    Args:
      groups: attention to the groups `current`, `key`, `null_key` and `value` of positions, [L, B, H, Q] each.
      has_null_BxQ: whether the read has positions in `null_key`.

    Returns:
      `key`: the share of the key read in the attention to values. `key_null`: the share of the null's key. `recency`:
      the current value's share of the key's part.
    """

    def share(part: str, whole: str) -> jax.Array:
        defined = groups[whole] >= SELECTIVITY_FLOOR
        return jnp.where(defined, groups[part] / jnp.maximum(groups[whole], SELECTIVITY_FLOOR), jnp.nan)

    key_null = jnp.where(has_null_BxQ[None, :, None], share("null_key", "value"), jnp.nan)
    return {"key": share("key", "value"), "key_null": key_null, "recency": share("current", "key")}


def read_selectivities(of_heads: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Reduces the selectivities of heads to those of reads, [B, Q] each; NaN if undefined.

    Args:
      of_heads: as `head_selectivities` returns them.

    Returns:
      `key` and `key_null`: the largest of any head. `recency`: that of the head with the largest `key`.
    """

    def heads_last(x_LxBxHxQ: jax.Array) -> jax.Array:
        layers, batch, heads, reads = x_LxBxHxQ.shape
        return jnp.moveaxis(x_LxBxHxQ, 0, 1).reshape(batch, layers * heads, reads).swapaxes(1, 2)

    key, key_null, recency = (heads_last(of_heads[name]) for name in ("key", "key_null", "recency"))
    shares = jnp.where(jnp.isnan(key), -jnp.inf, key)
    best = jnp.argmax(shares, axis=-1)[..., None]
    return {
        "key": jnp.take_along_axis(key, best, axis=-1)[..., 0],
        "key_null": _largest_defined(key_null),
        "recency": jnp.take_along_axis(recency, best, axis=-1)[..., 0],
    }


def _largest_defined(x: jax.Array) -> jax.Array:
    largest = jnp.max(jnp.where(jnp.isnan(x), -jnp.inf, x), axis=-1)
    return jnp.where(jnp.isfinite(largest), largest, jnp.nan)
