"""Restarts forward passes: keeps a clean pass, and computes only what an intervention can change.

An edit in layer l leaves everything before it unchanged, so an intervened run restarts inside layer l, at its earliest
edit. Only reads are measured under an intervention, so the last block computes its queries, MLP and logits at the
reads' prediction positions alone. An edit at one position leaves earlier positions unchanged as well: given a window,
only the positions in it are computed, on top of the clean run's keys and values.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.errors import InputError
from kvjax.model.attention import Prefix, attention_mask, window_mask
from kvjax.model.decoder import Block, Decoder, gelu
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.head_writes import HeadWrites
from kvjax.model.interventions import Interventions, Tap, check_interventions, earliest_site
from kvjax.model.params import Params, layer_params
from kvjax.model.sites import SITE_ORDER, SITES, Trace, take_positions
from kvjax.model.transforms import plain_forward

# The activations of the clean run that restarts need: every other site's is made from these.
RESTART_CAPTURE = ("embedding", "head_z", "post_attn", "mlp_out", "post_mlp")
# Restarts from one head also need these.
HEAD_CAPTURE = ("mlp_pre",)
# Restarts inside a window also need these.
WINDOW_CAPTURE = ("key", "value")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CleanRun:
    """The clean pass over one batch.

    Attributes:
      tokens: [B, T].
      trace: the captured activations, at least `RESTART_CAPTURE`; with `HEAD_CAPTURE` for restarts from a head,
        `WINDOW_CAPTURE` for windows. If it holds `mlp_hidden`, edits of that site do not compute it again. It may cover
        more than T positions; `at` takes the first T.
    """

    tokens: jax.Array
    trace: Trace

    def cut(self, length: int) -> CleanRun:
        """Cuts the run to its first `length` positions; later ones have no effect on them."""
        # The trace is not copied: `at` cuts it for free, whereas copying takes 3 % of a sweep on one core.
        return CleanRun(self.tokens[:, :length], self.trace)

    def at(self, name: str, layer: jax.Array | int | None = None) -> jax.Array:
        """Reads a site's activation at the run's positions, of all layers or one, which may be traced."""
        x, axis = self.trace[name], SITES[name].positions
        if layer is not None:
            x = jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)
        elif SITES[name].per_layer:
            axis += 1
        return self._cut(x, axis)

    def before(self, layer: jax.Array | int) -> jax.Array:
        """Reads the residual stream before a layer, which may be traced: [B, T, D]."""
        return self._cut(before_layer(self.trace, layer), 1)

    def _cut(self, x: jax.Array, axis: int) -> jax.Array:
        return jax.lax.slice_in_dim(x, 0, min(self.tokens.shape[1], x.shape[axis]), axis=axis)


def run_clean(
    params: Params, config: DecoderConfig, tokens_BxT: jax.Array, capture: tuple[str, ...]
) -> tuple[jax.Array, CleanRun]:
    """Runs every layer at every position: logits [B, T, V], and the clean pass with the sites in `capture`."""
    logits, trace = plain_forward(config)(params, tokens_BxT, capture=capture)
    return logits, CleanRun(tokens_BxT, trace)


def restart(
    params: Params,
    config: DecoderConfig,
    clean: CleanRun,
    edits: Interventions,
    *,
    layer: jax.Array | int,
    positions_BxQ: jax.Array,
    window_BxW: jax.Array | None = None,
) -> jax.Array:
    """Computes the logits at given positions under `edits`, restarting from the clean run: [B, Q, V].

    Args:
      params: of the checkpoint the clean run came from.
      config: the model's shape.
      clean: the clean run.
      edits: the interventions, at any sites. Per-layer ones take effect from `layer` on; the run restarts in `layer`,
        before the earliest of their sites.
      layer: the first layer edited. A Python number may name any layer; a traced one must lie before the last.
      positions_BxQ: the positions read.
      window_BxW: consecutive positions to compute, the first edited one of each sequence first; all others keep their
        clean keys and values. Positions read outside the window get meaningless logits. None: all positions.

    Raises:
      InputError: an edit is of no site or of another rank, or edits the attention pattern inside a window.
    """
    check_interventions(edits)
    if not edits:
        raise InputError("restart: expected an edit; found none (the clean run has the logits)")
    if window_BxW is not None and "pattern" in edits:
        raise InputError("restart: expected edits of other sites inside a window; found one of pattern")
    span = _Span(clean.tokens != config.pad_id, positions_BxQ, window_BxW)
    site, model, variables = earliest_site(edits), Decoder(config), {"params": params}
    # The last layer is a program of its own, at the positions read alone, because no other output of it is used.
    in_last = isinstance(layer, int) and layer == config.n_layers - 1
    read_tap = Tap(edits, queried_BxP=positions_BxQ)
    if not SITES[site].per_layer:
        if site == "embedding":
            resid = Tap(edits, queried_BxP=window_BxW)("embedding", span.rows(clean.at("embedding")))
            resid = _blocks_from(params, config, clean, resid, edits, 0, span)
        else:
            resid = take_positions(clean.at("post_mlp", config.n_layers - 1), positions_BxQ, 1)
        return model.apply(variables, resid, read_tap, method=Decoder.read_out)
    if SITE_ORDER[site] < SITE_ORDER["head_z"]:
        resid = span.rows(clean.before(layer))
        first = layer
    else:
        resid = _second_half(params, config, clean, edits, site, layer, span, in_last=in_last)
        first = layer + 1
    if not (in_last and first == config.n_layers):
        resid = _blocks_from(params, config, clean, resid, edits, first, span)
    return model.apply(variables, resid, read_tap, method=Decoder.read_out)


def restart_from_head(
    params: Params,
    config: DecoderConfig,
    clean: CleanRun,
    writes: HeadWrites,
    value_BxTxE: jax.Array,
    *,
    layer: jax.Array | int,
    head: jax.Array | int,
    positions_BxQ: jax.Array,
) -> jax.Array:
    """Computes the logits at given positions with one head's z replaced: `restart` from `head_z`, with less work.

    Args:
      params: of the checkpoint the clean run came from.
      config: the model's shape.
      clean: the clean run, with `HEAD_CAPTURE`.
      writes: of the checkpoint.
      value_BxTxE: replaces the head's z at every position.
      layer: the head's. A Python number may name any layer; a traced one must lie before the last.
      head: its number, which may be traced.
      positions_BxQ: the positions read.

    Returns:
      Logits [B, Q, V].
    """
    span = _Span(clean.tokens != config.pad_id, positions_BxQ, None)
    in_last = isinstance(layer, int) and layer == config.n_layers - 1

    def kept(x_BxTxN: jax.Array) -> jax.Array:
        return take_positions(x_BxTxN, positions_BxQ, 1) if in_last else x_BxTxN

    change = kept(value_BxTxE - clean.at("head_z", layer)[:, :, head])
    before = (kept(clean.at(name, layer)) for name in ("post_attn", "mlp_pre"))
    resid, mlp_pre = writes.change(layer, head, change, *before, precision=config.precision)
    variables = {"params": layer_params(params, layer)}
    resid = Block(config).apply(variables, resid, gelu(mlp_pre), method=Block.from_mlp_hidden)
    if not in_last:
        resid = _blocks_from(params, config, clean, resid, {}, layer + 1, span)
    return Decoder(config).apply({"params": params}, resid, method=Decoder.read_out)


@dataclasses.dataclass(frozen=True)
class _Span:
    """Which positions a restarted run computes: all or a window, and those read."""

    is_token_BxT: jax.Array
    positions_BxQ: jax.Array
    window_BxW: jax.Array | None

    def rows(self, x_BxTxN: jax.Array) -> jax.Array:
        """Selects the positions computed."""
        return x_BxTxN if self.window_BxW is None else take_positions(x_BxTxN, self.window_BxW, 1)

    @property
    def read_rows_BxQ(self) -> jax.Array:
        """Locates the positions read among those computed."""
        if self.window_BxW is None:
            return self.positions_BxQ
        return jnp.clip(self.positions_BxQ - self.window_BxW[:, :1], 0, self.window_BxW.shape[1] - 1)

    def mask(self, *, reads_only: bool) -> jax.Array:
        if self.window_BxW is None:
            return attention_mask(self.is_token_BxT, self.positions_BxQ if reads_only else None)
        return window_mask(self.is_token_BxT, self.window_BxW, self.positions_BxQ if reads_only else self.window_BxW)

    def prefix(self, clean: CleanRun, layer: jax.Array | int) -> Prefix | None:
        if self.window_BxW is None:
            return None
        return Prefix(clean.at("key", layer), clean.at("value", layer))


def _second_half(
    params: Params,
    config: DecoderConfig,
    clean: CleanRun,
    edits: Interventions,
    site: str,
    layer: jax.Array | int,
    span: _Span,
    *,
    in_last: bool,
) -> jax.Array:
    """Computes the residual stream after a layer whose queries, keys and values are clean."""
    positions = span.positions_BxQ if in_last else span.window_BxW
    tap = Tap(edits, layer, queried_BxP=positions)
    block, variables = Block(config), {"params": layer_params(params, layer)}

    def kept(x: jax.Array) -> jax.Array:
        return x if positions is None else take_positions(x, positions, 1)

    def of_layer(name: str) -> jax.Array:
        return kept(clean.at(name, layer))

    if site in ("head_z", "attn_out"):
        # Any heads may be edited: all are projected again. `restart_from_head` is for one.
        before = kept(clean.before(layer))
        return block.apply(variables, before, of_layer("head_z"), tap, method=Block.from_head_z)
    if site == "mlp_hidden" and "mlp_hidden" in clean.trace:
        kept_hidden = of_layer("mlp_hidden")
        return block.apply(variables, of_layer("post_attn"), kept_hidden, tap, method=Block.from_mlp_hidden)
    if site in ("post_attn", "mlp_input", "mlp_pre", "mlp_hidden"):
        return block.apply(variables, of_layer("post_attn"), tap, method=Block.from_post_attn)
    if site == "mlp_out":
        return block.apply(variables, of_layer("post_attn"), of_layer("mlp_out"), tap, method=Block.from_mlp_out)
    return tap("post_mlp", of_layer("post_mlp"))


def _blocks_from(
    params: Params,
    config: DecoderConfig,
    clean: CleanRun,
    resid: jax.Array,
    edits: Interventions,
    first: jax.Array | int,
    span: _Span,
) -> jax.Array:
    """Runs the blocks from `first` on: the residual stream after the last block at the positions read."""
    block, last = Block(config), config.n_layers - 1
    mask = span.mask(reads_only=False)

    def body(layer: jax.Array, resid: jax.Array) -> jax.Array:
        tap = Tap(edits, layer, queried_BxP=span.window_BxW, context_BxT=span.window_BxW)
        variables = {"params": layer_params(params, layer)}
        return block.apply(variables, resid, mask, tap, prefix=span.prefix(clean, layer))

    # A loop with a traced start: one compilation whatever the layer and the depth.
    if not (isinstance(first, int) and first == last):
        resid = jax.lax.fori_loop(first, last, body, resid)
    return block.apply(
        {"params": layer_params(params, last)},
        resid,
        span.mask(reads_only=True),
        Tap(edits, last, queried_BxP=span.positions_BxQ, context_BxT=span.window_BxW),
        queries_BxP=span.read_rows_BxQ,
        prefix=span.prefix(clean, last),
    )


def before_layer(trace: Trace, layer: jax.Array | int) -> jax.Array:
    """Reads the residual stream before a layer from a trace, [B, T, D]; `layer` may be traced."""
    if isinstance(layer, int):
        return trace["embedding"] if layer == 0 else trace["post_mlp"][layer - 1]
    previous = jax.lax.dynamic_index_in_dim(trace["post_mlp"], jnp.maximum(layer - 1, 0), 0, False)
    return jnp.where(layer == 0, trace["embedding"], previous)
