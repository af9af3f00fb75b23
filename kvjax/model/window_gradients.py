"""Differentiates a metric with respect to every output and every input inside a window, in one backward pass.

Zeros are added to what components write and to what they read, and their gradients are taken. Inputs are differentiated
behind their LayerNorm, and those of heads behind the projection as well: there a position has one of them, where the
residual stream has one for each head. `of_heads`, `of_mlp` and `of_logits` take changes of the stream there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.model.attention import Prefix, window_mask
from kvjax.model.decoder import LAYER_NORM_EPS, Block, Decoder
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.interventions import NO_TAP
from kvjax.model.params import Params, layer_params
from kvjax.model.restart import CleanRun
from kvjax.model.sites import Trace, take_positions

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WindowGradients:
    """Gradients of a metric inside a window.

    Attributes:
      outputs: with respect to what is written: `embedding` [B, W, D], `head_z` [L, B, W, H, E], `mlp_out` [L, B, W, D].
      inputs: with respect to what is read: each head's query, key and value, `q_proj`, … [L, B, H, W, E]; after their
        LayerNorm the MLPs' inputs, `mlp` [L, B, W, D], and the logits' at the reads, `logits` [B, Q, D].
      before_norm: the residual stream that these LayerNorms get: `heads` and `mlp` [L, B, W, D], `logits` [B, Q, D].
      rows_BxQ: the reads, counted from the start of the window.
    """

    outputs: Trace
    inputs: Trace
    before_norm: Trace
    rows_BxQ: jax.Array

    def of_heads(self, params: Params, config: DecoderConfig, layer: int, changes_BxSxWxD: jax.Array) -> jax.Array:
        """Multiplies changes of the stream by the gradients at a layer's query, key and value inputs, [B, S, 3 H]."""
        own = layer_params(params, layer)
        block = Block(config).bind({"params": own})
        back = [block.attn.back_to_states(name, self.inputs[name][layer]) for name in _PROJECTIONS]
        normed = _through(own["ln_1"], self.before_norm["heads"][layer], changes_BxSxWxD)
        # One product of rows [W D]: contracting both axes apart would copy all of them.
        rows_BxSxN, towards_BxRxN = (x.reshape(*x.shape[:2], -1) for x in (normed, jnp.concatenate(back, axis=1)))
        return jnp.matmul(rows_BxSxN, towards_BxRxN.swapaxes(1, 2), precision=config.precision)

    def of_mlp(self, params: Params, layer: int, changes_BxSxWxD: jax.Array) -> jax.Array:
        """Multiplies changes of the stream by the gradient at a layer's MLP input, [B, S, 1]."""
        own = layer_params(params, layer)
        normed = _through(own["ln_2"], self.before_norm["mlp"][layer], changes_BxSxWxD)
        return jnp.sum(normed * self.inputs["mlp"][layer][:, None], axis=(2, 3))[..., None]

    def of_logits(self, params: Params, changes_BxSxWxD: jax.Array) -> jax.Array:
        """Multiplies changes of the stream by the gradient at the logits' input, [B, S, 1]."""
        at_reads = take_positions(changes_BxSxWxD, self.rows_BxQ, 2)
        normed = _through(params["final_norm"], self.before_norm["logits"], at_reads)
        return jnp.sum(normed * self.inputs["logits"][:, None], axis=(2, 3))[..., None]


def _through(norm: Params, x_BxPxD: jax.Array, changes_BxSxPxD: jax.Array) -> jax.Array:
    """Computes what changes of the input of a LayerNorm with these parameters do to its output, to first order."""
    # Written out: `jax.jvp` under `jax.vmap` would move the axis of senders to the front and back.
    centred = (x_BxPxD - jnp.mean(x_BxPxD, axis=-1, keepdims=True))[:, None]
    deviation = jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + LAYER_NORM_EPS)
    normed = centred / deviation
    changes = changes_BxSxPxD - jnp.mean(changes_BxSxPxD, axis=-1, keepdims=True)
    changes -= normed * jnp.mean(normed * changes, axis=-1, keepdims=True)
    return changes * (norm["scale"][None, None, None] / deviation)


def window_gradients(
    params: Params,
    config: DecoderConfig,
    clean: CleanRun,
    embedding_BxWxD: jax.Array,
    metric: Callable[[jax.Array], jax.Array],
    *,
    positions_BxQ: jax.Array,
    window_BxW: jax.Array,
) -> WindowGradients:
    """Differentiates a metric of the logits inside a window; each gradient counts all ways to the logits from there on.

    Args:
      params: of the checkpoint the clean run came from.
      config: the model's shape.
      clean: the clean run, with `WINDOW_CAPTURE`; positions before the window keep its keys and values.
      embedding_BxWxD: the embedding inside the window of the run that is differentiated.
      metric: of the logits [B, Q, V] at the positions read, a scalar.
      positions_BxQ: the positions read; the metric must not depend on those outside the window.
      window_BxW: consecutive positions; the last one may be repeated, and has no gradient there.
    """
    mask = window_mask(clean.tokens != config.pad_id, window_BxW, window_BxW)
    rows_BxQ = jnp.clip(positions_BxQ - window_BxW[:, :1], 0, window_BxW.shape[1] - 1)
    batch, width, layers, heads = *window_BxW.shape, config.n_layers, config.n_heads
    of_stream = (batch, width, config.d_model)
    shapes = dict.fromkeys(_PROJECTIONS, (layers, batch, heads, width, config.d_head))
    shapes |= {"head_z": (layers, batch, width, heads, config.d_head)}
    shapes |= dict.fromkeys(("mlp", "mlp_out"), (layers, *of_stream))
    in_layers = {name: jnp.zeros(shape, embedding_BxWxD.dtype) for name, shape in shapes.items()}
    at_reads = jnp.zeros((*rows_BxQ.shape, config.d_model), embedding_BxWxD.dtype)
    keys, values = clean.at("key"), clean.at("value")

    def body(resid: jax.Array, at: Any) -> tuple[jax.Array, Trace]:
        own, prefix, added = at
        block = Block(config).bind({"params": own})
        normed = block.ln_1(resid)
        q, k, v = (block.attn.of_heads(name, normed) + added[name] for name in _PROJECTIONS)
        z = block.attn.attend(q, k, v, mask, prefix=prefix) + added["head_z"]
        post_attn = block.post_attn(resid, z)
        mlp_out = block.mlp(block.ln_2(post_attn) + added["mlp"], NO_TAP) + added["mlp_out"]
        return post_attn + mlp_out, {"heads": resid, "mlp": post_attn}

    def run(embedding_BxWxD: jax.Array, in_layers: Trace, at_reads: jax.Array) -> tuple[jax.Array, Trace]:
        by_layer = (params["blocks"], Prefix(keys, values), in_layers)
        resid, seen = jax.lax.scan(body, embedding_BxWxD, by_layer)
        model, last = Decoder(config).bind({"params": params}), take_positions(resid, rows_BxQ, 1)
        return metric(model.unembed(model.final_norm(last) + at_reads)), seen | {"logits": last}

    differentiated = jax.grad(run, argnums=(0, 1, 2), has_aux=True)
    (at_embedding, found, at_logits), seen = differentiated(embedding_BxWxD, in_layers, at_reads)
    outputs = {"embedding": at_embedding, "head_z": found["head_z"], "mlp_out": found["mlp_out"]}
    inputs = {name: found[name] for name in (*_PROJECTIONS, "mlp")} | {"logits": at_logits}
    return WindowGradients(outputs, inputs, seen, rows_BxQ)
