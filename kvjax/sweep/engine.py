"""The engine: a clean pass that keeps what restarts need, and intervened runs that compute only what can have changed.

An edit in layer l leaves everything before it as in the clean run, so an intervened run restarts inside layer l: after
the heads for an edit of `head_z`, after the MLP for one of `mlp_out`. Reads are all that is measured under an
intervention, so the last block computes its queries, MLP and logits at the prediction positions alone.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax

from kvjax.errors import InputError
from kvjax.model.decoder import Block, Decoder, DecoderConfig, Params, attention_mask, layer_params
from kvjax.model.interventions import Interventions, editing_tap
from kvjax.model.sites import Trace, take_positions
from kvjax.model.transforms import plain_forward

RestartSite = Literal["head_z", "mlp_out"]

# What each restart needs of the clean run, beside the residual stream before the block.
RESTART_CAPTURE = ("embedding", "head_z", "post_attn", "mlp_out", "post_mlp")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CleanRun:
    """The clean pass over one batch.

    Attributes:
      tokens: [B, T].
      logits: [B, T, V].
      trace: the captured activations, at least `RESTART_CAPTURE`.
    """

    tokens: jax.Array
    logits: jax.Array
    trace: Trace


def run_clean(params: Params, config: DecoderConfig, tokens_BxT: jax.Array, capture: tuple[str, ...]) -> CleanRun:
    """Returns the clean pass, every layer at every position, keeping `capture`."""
    logits, trace = plain_forward(config)(params, tokens_BxT, capture=capture)
    return CleanRun(tokens_BxT, logits, trace)


def restart(
    params: Params,
    config: DecoderConfig,
    clean: CleanRun,
    edits: Interventions,
    *,
    site: RestartSite,
    layer: jax.Array | int,
    positions_BxQ: jax.Array,
) -> jax.Array:
    """Returns the logits at given positions of a run under `edits`, restarted from the clean one: [B, Q, V].

    Args:
      params: of the checkpoint the clean run came from.
      config: the model's shape.
      clean: the clean run.
      edits: the interventions; whatever they name in earlier layers, or earlier in this one, stays clean.
      site: the earliest site edited.
      layer: its layer. A Python number may name any layer; a traced one must lie before the last.
      positions_BxQ: the positions read.

    Raises:
      InputError: an edit names the embedding, which lies before every restart.
    """
    if "embedding" in edits:
        raise InputError(f"restart at {site}: expected edits after it; found one of embedding")
    in_last_layer = isinstance(layer, int) and layer == config.n_layers - 1
    here = positions_BxQ if in_last_layer else None
    tap = editing_tap(edits, layer, here)
    block_params = {"params": layer_params(params, layer)}

    def kept(name: str) -> jax.Array:
        x = jax.lax.dynamic_index_in_dim(clean.trace[name], layer, 0, keepdims=False)
        return take_positions(x, positions_BxQ, 1) if in_last_layer else x

    if site == "head_z":
        before = _before_layer(clean.trace, layer)
        before = take_positions(before, positions_BxQ, 1) if in_last_layer else before
        resid = Block(config).apply(block_params, before, kept("head_z"), tap, method=Block.from_head_z)
    else:
        resid = Block(config).apply(block_params, kept("post_attn"), kept("mlp_out"), tap, method=Block.from_mlp_out)
    if not in_last_layer:
        resid = _later_blocks(params, config, clean.tokens, resid, edits, layer + 1, positions_BxQ)
    normed = Decoder(config).apply({"params": params}, resid, method=lambda model, x: model.final_norm(x))
    normed = editing_tap(edits, positions_BxQ=positions_BxQ)("final_norm", normed)
    return Decoder(config).apply({"params": params}, normed, method=Decoder.unembed)


def _before_layer(trace: Trace, layer: jax.Array | int) -> jax.Array:
    """Returns the clean residual stream before a layer, [B, T, D]; `layer` may be traced."""
    if isinstance(layer, int):
        return trace["embedding"] if layer == 0 else trace["post_mlp"][layer - 1]
    previous = jax.lax.dynamic_index_in_dim(trace["post_mlp"], jax.numpy.maximum(layer - 1, 0), 0, False)
    return jax.numpy.where(layer == 0, trace["embedding"], previous)


def _later_blocks(
    params: Params,
    config: DecoderConfig,
    tokens_BxT: jax.Array,
    resid_BxTxD: jax.Array,
    edits: Interventions,
    first: jax.Array | int,
    positions_BxQ: jax.Array,
) -> jax.Array:
    """Returns the residual stream after the last block at `positions_BxQ`, from the one before block `first`."""
    block, last = Block(config), config.n_layers - 1
    mask = attention_mask(tokens_BxT)

    def body(layer: jax.Array, resid_BxTxD: jax.Array) -> jax.Array:
        tap = editing_tap(edits, layer)
        return block.apply({"params": layer_params(params, layer)}, resid_BxTxD, mask, tap)

    # A loop with a traced start: one compilation whatever the layer and the depth.
    resid_BxTxD = jax.lax.fori_loop(first, last, body, resid_BxTxD)
    return block.apply(
        {"params": layer_params(params, last)},
        resid_BxTxD,
        attention_mask(tokens_BxT, positions_BxQ),
        editing_tap(edits, last, positions_BxQ),
        positions_BxQ,
    )
