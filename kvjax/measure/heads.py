"""Measures where heads attend (docs/definitions.md, "Heads and MLPs")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from kvjax.measure.behaviour import relation_attention
from kvjax.model.sites import take_positions


def attention_per_read(
    pattern_LxBxHxTxT: jax.Array,
    prediction_positions_BxQ: jax.Array,
    support_positions_BxQ: jax.Array,
    relations_BxQxT: jax.Array,
    relation_groups: Mapping[str, Sequence[int]],
) -> dict[str, jax.Array]:
    """Measures where each head attends at each read, [L, B, H, Q] each.

    From p_e: `query_attention` to k_e, `support_attention` to s_e, `current_value_attention` to the current value and
    its copies, `stale_attention` to the stale value and its copies, `current`, `key`, `null_key` and `value` to those
    groups of positions, and `attention_entropy` in nats. From s_e: `binding_attention` to the key token of the same
    write.

    Args:
      pattern_LxBxHxTxT: attention probabilities, queries on the second last axis.
      prediction_positions_BxQ, support_positions_BxQ: p_e and s_e.
      relations_BxQxT: the relation of each position to each read.
      relation_groups: the relations in each of the groups `current`, `stale`, `key`, `null_key` and `value`.
    """

    def rows(positions_BxQ: jax.Array) -> jax.Array:
        return jax.vmap(lambda pattern: take_positions(pattern, positions_BxQ, 2))(pattern_LxBxHxTxT)

    def entries(rows_LxBxHxQxT: jax.Array, positions_BxQ: jax.Array) -> jax.Array:
        return jnp.take_along_axis(rows_LxBxHxQxT, positions_BxQ[None, :, None, :, None], axis=-1)[..., 0]

    from_prediction = rows(prediction_positions_BxQ)
    from_support = rows(support_positions_BxQ)
    groups = relation_attention(from_prediction, relations_BxQxT, relation_groups)
    # Padding reads point at position 0, and no position lies before that.
    write_key_positions = jnp.maximum(support_positions_BxQ - 1, 0)
    return {
        "query_attention": entries(from_prediction, prediction_positions_BxQ),
        "support_attention": entries(from_prediction, support_positions_BxQ),
        "current_value_attention": groups["current"],
        "stale_attention": groups["stale"],
        "binding_attention": entries(from_support, write_key_positions),
        "attention_entropy": -jnp.sum(jax.scipy.special.xlogy(from_prediction, from_prediction), axis=-1),
        **{name: groups[name] for name in ("current", "key", "null_key", "value")},
    }
