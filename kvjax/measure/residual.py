"""Measures the residual stream: logit lens, margins, drift and CKA (docs/definitions.md, "Residual stream")."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.measure.behaviour import answer_margin, wins_among


def lens_per_read(
    prediction_logits_SxBxQxV: jax.Array,
    support_logits_SxBxQxV: jax.Array,
    answers_BxQ: jax.Array,
    keys_BxQ: jax.Array,
    *,
    value_ids: jax.Array,
    key_ids: jax.Array,
) -> dict[str, jax.Array]:
    """Reads every stage of each read through the logit lens, [S, B, Q] each.

    Args:
      prediction_logits_SxBxQxV: every stage at p_e (= k_e), through final LayerNorm and unembedding.
      support_logits_SxBxQxV: every stage at s_e, likewise.
      answers_BxQ, keys_BxQ: token ids.
      value_ids, key_ids: the tokens each accuracy is restricted to.

    Returns:
      `answer_correct` (value tokens at p_e), `query_key_correct` (key tokens at k_e), `support_value_correct` (value
      tokens at s_e) and `answer_margin` (at p_e).
    """
    stages = len(prediction_logits_SxBxQxV)
    answers_SxBxQ, keys_SxBxQ = (jnp.broadcast_to(x, (stages, *x.shape)) for x in (answers_BxQ, keys_BxQ))
    return {
        "answer_correct": wins_among(prediction_logits_SxBxQxV, answers_SxBxQ, value_ids),
        "query_key_correct": wins_among(prediction_logits_SxBxQxV, keys_SxBxQ, key_ids),
        "support_value_correct": wins_among(support_logits_SxBxQxV, answers_SxBxQ, value_ids),
        "answer_margin": answer_margin(prediction_logits_SxBxQxV, answers_SxBxQ, value_ids),
    }


def state_sums(states_SxBxQxD: jax.Array, is_read_BxQ: jax.Array, split_weights_BxZ: jax.Array) -> jax.Array:
    """Sums the states over reads, by split: [Z, S, D].

    Args:
      states_SxBxQxD: every stage at one position of each read.
      is_read_BxQ: which reads exist.
      split_weights_BxZ: 1 where sequence B is in split Z, else 0.
    """
    per_sequence = jnp.sum(jnp.where(is_read_BxQ[None, ..., None], states_SxBxQxD, 0.0), axis=2)
    return jnp.einsum("sbd,bz->zsd", per_sequence, split_weights_BxZ, precision="highest")


def cosine_drift(sums_SxD: np.ndarray, reference_SxD: np.ndarray) -> np.ndarray:
    """Computes 1 - cosine between two states, or sums of states, [S]; NaN if one of them is zero.

    It computes in float64, because early stages move by 1e-5 and less between checkpoints.
    """
    a, b = np.asarray(sums_SxD, np.float64), np.asarray(reference_SxD, np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1.0 - np.sum(a * b, axis=-1) / norms


def event_drift(states_xD: jax.Array, others_xD: jax.Array) -> jax.Array:
    """Computes 1 - cosine of every event's state with its state in another checkpoint; NaN for a zero state."""

    def unit(x: jax.Array) -> jax.Array:
        norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
        return jnp.where(norm > 0, x / jnp.where(norm > 0, norm, 1.0), jnp.nan)

    # Half the squared distance of unit vectors: 1 - cosine itself would keep no digit of a drift below 1e-7.
    return 0.5 * jnp.sum((unit(states_xD) - unit(others_xD)) ** 2, axis=-1)


def linear_cka(
    states_ZxMxD: jax.Array,
    others_ZxMxD: jax.Array,
    counted_ZxM: jax.Array,
    spreads: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Computes the linear centred kernel alignment of two checkpoints' states over the same events, [1 + Z].

    It is 1 if one is a rotation and rescaling of the other, 0 if no direction of one varies with one of the other, and
    NaN if either does not vary.

    Args:
      states_ZxMxD, others_ZxMxD: of the events of every split.
      counted_ZxM: bool, the events that count.
      spreads: of the two, [1 + Z] each, from `spread`, if they are known already.

    Returns:
      Over the events of all splits together, then over those of each.

    Source: Kornblith et al., Similarity of neural network representations revisited (2019), equation 5.
    """
    own, other = spreads or (spread(states_ZxMxD, counted_ZxM), spread(others_ZxMxD, counted_ZxM))
    scale = own * other
    shared = _cross_spread(states_ZxMxD, others_ZxMxD, counted_ZxM)
    return jnp.where(scale > 0, shared**2 / jnp.where(scale > 0, scale, 1.0), jnp.nan)


def spread(states_ZxMxD: jax.Array, counted_ZxM: jax.Array) -> jax.Array:
    """Computes the Frobenius norm of the scatter matrix of the states that count, [1 + Z] as `linear_cka`."""
    return _cross_spread(states_ZxMxD, states_ZxMxD, counted_ZxM)


def _cross_spread(states_ZxMxD: jax.Array, others_ZxMxD: jax.Array, counted_ZxM: jax.Array) -> jax.Array:
    """Computes the norm of the scatter of all events, and of each split's.

    One product over the events serves both: the scatter of all is that within the splits and that of their means.
    """
    weights_ZxM = counted_ZxM.astype(jnp.float32)
    counts_Z = jnp.sum(weights_ZxM, axis=1)
    shares_Z = counts_Z / jnp.maximum(jnp.sum(counts_Z), 1.0)

    def centred(x_ZxMxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        # A product, because XLA sums columns on a CPU one element at a time.
        average_Zx1xM = (weights_ZxM / jnp.maximum(counts_Z, 1.0)[:, None])[:, None]
        means_Zx1xD = jnp.matmul(average_Zx1xM, x_ZxMxD, precision="highest")
        means_ZxD = means_Zx1xD[:, 0]
        between_ZxD = means_ZxD - jnp.matmul(shares_Z[None], means_ZxD, precision="highest")
        return (x_ZxMxD - means_Zx1xD) * weights_ZxM[..., None], between_ZxD

    (own, own_between_ZxD), (other, other_between_ZxD) = centred(states_ZxMxD), centred(others_ZxMxD)
    within_ZxDxD = jnp.matmul(own.swapaxes(1, 2), other, precision="highest")
    between_DxD = jnp.matmul((own_between_ZxD * counts_Z[:, None]).T, other_between_ZxD, precision="highest")
    scatter = jnp.concatenate([(jnp.sum(within_ZxDxD, axis=0) + between_DxD)[None], within_ZxDxD])
    return jnp.linalg.norm(scatter, axis=(1, 2))
