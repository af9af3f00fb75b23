"""Attributes logits directly: what each component writes towards the answer (docs/definitions.md, "Heads and MLPs")."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.model.decoder import LAYER_NORM_EPS
from kvjax.model.params import Params
from kvjax.model.sites import Trace
from kvjax.model.weights import head_output_kernels, unembedding


def direct_logit_attribution(
    params: Params, trace_at_reads: Trace, answers_BxQ: jax.Array, value_ids: jax.Array
) -> dict[str, jax.Array]:
    """Splits logit(answer) - mean logit over value tokens into each component's part, through the clean LayerNorm.

    The component's output at p_e, centred over its D entries, is divided by the clean final LayerNorm's scale there,
    multiplied by its gain, and dotted with (unembedding of the answer - mean unembedding of the value tokens). The
    terms of all components sum to that logit difference.

    Args:
      params: of the checkpoint.
      trace_at_reads: `embedding` [B, Q, D], `head_z` [L, B, Q, H, E], `mlp_out` and `post_mlp` [L, B, Q, D], at p_e.
      answers_BxQ: token ids y_e.
      value_ids: [values] token ids.

    Returns:
      `embedding`, `final_norm_bias` [B, Q]; `attn_bias`, `mlp` [L, B, Q]; `head` [L, B, H, Q]; in logits.
      Source: Elhage et al., A mathematical framework for transformer circuits (2021).
    """
    target_BxQxD = _target(params, answers_BxQ, value_ids)
    direction_BxQxD = answer_direction(params, trace_at_reads["post_mlp"][-1], answers_BxQ, value_ids)

    def along(outputs: jax.Array) -> jax.Array:
        extra = (None,) * (outputs.ndim - 3)
        return jnp.sum(outputs * direction_BxQxD[extra], axis=-1)

    z = trace_at_reads["head_z"]
    kernel_LxHxExD = head_output_kernels(params, z.shape[3])
    z_direction = jnp.einsum("lhed,bqd->lbqhe", kernel_LxHxExD, direction_BxQxD, precision="highest")
    return {
        "embedding": along(trace_at_reads["embedding"]),
        "head": jnp.sum(z * z_direction, axis=-1).swapaxes(2, 3),
        "attn_bias": along(params["blocks"]["attn"]["out_proj"]["bias"][:, None, None]),
        "mlp": along(trace_at_reads["mlp_out"]),
        "final_norm_bias": jnp.sum(target_BxQxD * params["final_norm"]["bias"][None, None], axis=-1),
    }


def answer_direction(params: Params, final_BxQxD: jax.Array, answers_BxQ: jax.Array, value_ids: jax.Array) -> jax.Array:
    """Finds the direction along which an output at p_e adds to logit(answer) - mean logit over values, [B, Q, D].

    Args:
      params: of the checkpoint.
      final_BxQxD: the residual stream before the final LayerNorm, at p_e.
      answers_BxQ: token ids y_e.
      value_ids: [values] token ids.
    """
    towards = _target(params, answers_BxQ, value_ids) * params["final_norm"]["scale"][None, None]
    scale = jax.lax.rsqrt(jnp.var(final_BxQxD, axis=-1, keepdims=True) + LAYER_NORM_EPS)
    # Centring is symmetric, so it is applied once to the direction instead of to every output.
    return (towards - jnp.mean(towards, axis=-1, keepdims=True)) * scale


def _target(params: Params, answers_BxQ: jax.Array, value_ids: jax.Array) -> jax.Array:
    unembedding_VxD = jnp.asarray(unembedding(params))  # of the device: indices are traced
    return unembedding_VxD[answers_BxQ] - jnp.mean(unembedding_VxD[value_ids], axis=0)[None, None]
