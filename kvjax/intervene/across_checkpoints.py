"""Residual states across checkpoints: A run on with a stage's states of B (docs/definitions.md, section 9).

Whether what B holds at a stage can be read by A's later layers says which half of the mechanism changed between them.
`final_norm` is B's state through A's unembedding.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kvjax.intervene.pair_runs import PAIR_CAPTURE, Effects, answer_effects
from kvjax.intervene.patching import over_places, patch_edit, stage_places
from kvjax.model.decoder import DecoderConfig, Params
from kvjax.model.restart import restart, run_clean
from kvjax.model.sites import take_positions
from kvjax.task.corruption import PAIR_ROLES
from kvjax.task.pair_encoding import EncodedPairs

ROLES = ("all", *PAIR_ROLES)


def across_effects(params: Params, config: DecoderConfig, batch: EncodedPairs, stacked_others: Any) -> Effects:
    """Returns the metric on the clean streams of checkpoint A with each stage taken from each checkpoint B.

    Args:
      params: of checkpoint A.
      config: the shape of all.
      batch: a microbatch of pairs.
      stacked_others: parameters of the checkpoints B, stacked on a leading axis.

    Returns:
      Of each of `answer_effects`: `<name>` [B, others, stages, `ROLES`], and A's own `<name>_base` [B].
    """
    tokens = jnp.asarray(batch.clean_tokens)
    logits, own = run_clean(params, config, tokens, PAIR_CAPTURE)
    base = answer_effects(take_positions(logits, batch.prediction_positions, 1), batch)
    roles = jnp.asarray(batch.roles)
    masks = jnp.concatenate(
        [jnp.ones((1, *roles.shape), bool), roles[None] == jnp.arange(len(PAIR_ROLES))[:, None, None]]
    )

    def taken_from(other: Params) -> Effects:
        _, theirs = run_clean(other, config, tokens, PAIR_CAPTURE)

        def at_stage(site: str, layer: jax.Array | int, head: jax.Array) -> Effects:
            def at_role(mask_BxT: jax.Array) -> Effects:
                edits = patch_edit(config, theirs, site, layer, head, mask_BxT)
                read = restart(params, config, own, edits, layer=layer, positions_BxQ=batch.prediction_positions)
                return answer_effects(read, batch)

            return jax.lax.map(at_role, masks)

        return over_places(tuple(stage_places(config.n_layers).values()), config.n_layers, at_stage)

    found = jax.lax.map(taken_from, stacked_others)
    return {name: jnp.moveaxis(x, -1, 0) for name, x in found.items()} | {f"{n}_base": x for n, x in base.items()}
