"""Measures how far heads tell the support from other values before the softmax (docs/definitions.md)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kvjax.model.decoder import LAYER_NORM_EPS
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params
from kvjax.model.sites import Trace, take_positions


def qk_separation(
    params: Params,
    config: DecoderConfig,
    trace: Trace,
    key_directions_LxHxDxR: jax.Array,
    *,
    prediction_positions_BxQ: jax.Array,
    support_positions_BxQ: jax.Array,
    relations_BxQxT: jax.Array,
    value_relations: Sequence[int],
) -> tuple[jax.Array, jax.Array]:
    """Computes the score of p_e → s_e minus the mean score of p_e → every other earlier value position.

    Scores are linear in the keys' input, so that one difference of inputs per read and layer serves all heads. No score
    of another position is formed, and the keys' bias, equal for all positions, cancels.

    Args:
      params, config: of the checkpoint.
      trace: activations at all positions, at least `embedding` and `post_mlp`.
      key_directions_LxHxDxR: the leading right singular directions of every head's W_QK, gains folded in.
      prediction_positions_BxQ, support_positions_BxQ: p_e and s_e.
      relations_BxQxT: the relation of each position to each read.
      value_relations: the relations of value positions: values of writes, and answers of earlier reads.

    Returns:
      The separation, and the separation if keys are read through the given directions alone, [L, B, H, Q] in nats each:
      a difference of scores is the logarithm of a ratio of attention. 0 for reads without another value position.
    """
    blocks, shape = params["blocks"], (config.n_layers, config.d_model, config.n_heads, config.d_head)
    norm, attn = blocks["ln_1"], blocks["attn"]
    before_LxBxTxD = jnp.concatenate([trace["embedding"][None], trace["post_mlp"][:-1]])
    mean = jnp.mean(before_LxBxTxD, axis=-1, keepdims=True)
    variance = jnp.var(before_LxBxTxD, axis=-1, keepdims=True)
    normed_LxBxTxD = (before_LxBxTxD - mean) * jax.lax.rsqrt(variance + LAYER_NORM_EPS)

    def at(positions_BxQ: jax.Array) -> jax.Array:
        return jax.vmap(lambda x: take_positions(x, positions_BxQ, 1))(normed_LxBxTxD)

    positions = jnp.arange(relations_BxQxT.shape[-1])[None, None]
    is_value = jnp.isin(relations_BxQxT, jnp.array(value_relations))
    others_BxQxT = (is_value & (positions != support_positions_BxQ[..., None])).astype(jnp.float32)
    count_BxQ = jnp.sum(others_BxQxT, axis=-1)
    shares_BxQxT = others_BxQxT / jnp.maximum(count_BxQ, 1.0)[..., None]
    others_LxBxQxD = jnp.einsum("bqt,lbtd->lbqd", shares_BxQxT, normed_LxBxTxD, precision=config.precision)
    contrast_LxBxQxD = jnp.where((count_BxQ > 0)[None, ..., None], at(support_positions_BxQ) - others_LxBxQxD, 0.0)

    scale_LxD = norm["scale"][:, None, None]
    input_LxBxQxD = at(prediction_positions_BxQ) * scale_LxD + norm["bias"][:, None, None]
    query_kernel = attn["q_proj"]["kernel"].reshape(shape)
    query_bias = attn["q_proj"]["bias"].reshape(config.n_layers, 1, 1, config.n_heads, config.d_head)
    query = jnp.einsum("lbqd,ldhe->lbqhe", input_LxBxQxD, query_kernel, precision=config.precision) + query_bias
    key_kernel = attn["k_proj"]["kernel"].reshape(shape) * norm["scale"][:, :, None, None] * config.d_head**-0.5
    # What a query looks for, as a direction of the normalised residual stream.
    towards_LxBxQxHxD = jnp.einsum("lbqhe,ldhe->lbqhd", query, key_kernel, precision=config.precision)
    whole = jnp.sum(towards_LxBxQxHxD * contrast_LxBxQxD[:, :, :, None], axis=-1)

    def along_directions(of: str, x: jax.Array) -> jax.Array:
        return jnp.einsum(f"{of},lhdr->lbqhr", x, key_directions_LxHxDxR, precision=config.precision)

    leading = jnp.sum(
        along_directions("lbqhd", towards_LxBxQxHxD) * along_directions("lbqd", contrast_LxBxQxD), axis=-1
    )
    return whole.swapaxes(2, 3), leading.swapaxes(2, 3)
