"""Patches every direct path, the paths into one layer's heads together.

A sender's change reaches one input of one receiver; everything else before the receiver is as in the base run. In the
receiver's layer each sender's change goes through the projections of all heads at once. A head that is asked for
another query, key or value changes its own z alone, and the change is added to the base run's stream and activations
(`HeadWrites`). After that layer, paths are variants of the base run (`kvjax/model/variants.py`). In the last layer only
the reads are computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.intervene.pair_runs import Effects, PairRuns, answer_effects
from kvjax.intervene.paths import HEAD_INPUTS, Edge, all_edges, all_senders, run_changes, sender_changes
from kvjax.model.decoder import Block, Decoder, gelu
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.head_writes import HeadWrites
from kvjax.model.interventions import NO_TAP
from kvjax.model.params import Params, layer_params
from kvjax.model.sites import take_positions
from kvjax.model.variant_rows import Rows
from kvjax.model.variants import WindowRun, heads_with_changed_input, in_window, run_on


def rows_of_paths(config: DecoderConfig, window: int) -> int:
    """Counts the positions that are computed at once of a pair with a window of some positions."""
    return window * _into_layer(config)


def _into_layer(config: DecoderConfig) -> int:
    """Counts the receivers of a layer: three inputs of each head, and the MLP's."""
    return len(HEAD_INPUTS) * config.n_heads + 1


class _Layer(NamedTuple):
    """The base run inside a layer, in the window or at the reads: `head_z` [B, P, H, E], `post_attn`, `mlp_pre`."""

    head_z: jax.Array
    post_attn: jax.Array
    mlp_pre: jax.Array


def patched_paths(params: Params, config: DecoderConfig, runs: PairRuns) -> Effects:
    """Patches every direct path: of each of `answer_effects`, [B, edges] in the order of `all_edges`."""
    base = WindowRun.of(runs.base, config, runs.window_BxW, runs.batch.prediction_positions)
    changes_SxBxWxD = sender_changes(params, config, run_changes(runs, runs.window_BxW))
    writes, last = HeadWrites.of(params, config), config.n_layers - 1
    senders = all_senders(config.n_layers, config.n_heads)
    before = [[i for i, sender in enumerate(senders) if sender.layer < layer] for layer in range(last + 1)]
    own_heads = np.array(
        [[i for i, s in enumerate(senders) if (s.kind, s.layer) == ("head", layer)] for layer in range(last + 1)]
    )
    inside = _layers_in_window(params, config, runs)

    def effects(logits_BxKxQxV: jax.Array) -> Effects:
        return jax.vmap(answer_effects, in_axes=(1, None), out_axes=1)(logits_BxKxQxV, runs.batch)

    def run_from(layer: jax.Array, states_BxKxWxD: jax.Array) -> Effects:
        batch, variants, window = states_BxKxWxD.shape[:3]
        rows = Rows(window, (0,) * variants)
        return effects(run_on(params, config, base, states_BxKxWxD.reshape(batch, -1, config.d_model), rows, layer + 1))

    def into_layer(at: tuple[jax.Array, jax.Array]) -> Effects:
        layer, sender = at
        own = jax.tree.map(lambda x: x[layer], inside)
        return run_from(layer, _receive(params, config, base, writes, own, changes_SxBxWxD[sender], layer))

    def from_own_heads(at: tuple[jax.Array, jax.Array]) -> Effects:
        layer, heads = at
        return run_from(layer, _through_mlp(params, config, inside.post_attn[layer], changes_SxBxWxD[heads], layer))

    def read_out(states_BxKxQxD: jax.Array) -> Effects:
        return effects(Decoder(config).apply({"params": params}, states_BxKxQxD, method=Decoder.read_out))

    at_reads = _Layer(*(take_positions(x[last], base.reads_BxQ, 1) for x in inside))
    changes_at_reads = jax.vmap(lambda x: take_positions(x, base.reads_BxQ, 1))(changes_SxBxWxD)

    def into_last(sender: jax.Array) -> Effects:
        change = changes_SxBxWxD[sender]
        return read_out(_receive(params, config, base, writes, at_reads, change, last, base.reads_BxQ))

    found: dict[str, Effects] = {}
    early = [(layer, sender) for layer in range(last) for sender in before[layer]]
    if early:
        found["early"] = jax.lax.map(into_layer, tuple(map(jnp.array, zip(*early, strict=True))))
        found["early_heads"] = jax.lax.map(from_own_heads, (jnp.arange(last), jnp.array(own_heads[:last])))
    found["last"] = jax.lax.map(into_last, jnp.array(before[last]))
    found["last_heads"] = read_out(
        _through_mlp(params, config, at_reads.post_attn, changes_at_reads[own_heads[last]], last)
    )
    final = take_positions(runs.base.trace["post_mlp"][last], runs.batch.prediction_positions, 1)
    found["logits"] = read_out((final[None] + changes_at_reads).swapaxes(0, 1))
    parts = {part: effects["answer_logit"].shape for part, effects in found.items()}
    index = _order(config, parts, early, before[last], own_heads)

    def of_edges(name: str) -> jax.Array:
        flat = [jnp.moveaxis(of_part[name], -2, 0).reshape(len(final), -1) for of_part in found.values()]
        return jnp.concatenate(flat, axis=1)[:, index]

    return {name: of_edges(name) for name in runs.base_effects}


def _order(
    config: DecoderConfig,
    parts: Mapping[str, tuple[int, ...]],
    early: Sequence[tuple[int, int]],
    before_last: Sequence[int],
    own_heads: np.ndarray,
) -> np.ndarray:
    """Locates the edges of `all_edges` among the numbers of all parts, one after another without the axis of pairs."""
    senders, last = all_senders(config.n_layers, config.n_heads), config.n_layers - 1
    offsets, done = {}, 0
    for part, shape in parts.items():
        offsets[part] = done
        done += math.prod(shape) // shape[-2]

    def place(edge: Edge) -> int:
        sender, (site, layer, head) = senders.index(edge.sender), edge.receiver
        if site == "logits_input":
            return offsets["logits"] + sender
        if edge.sender.layer == layer:
            number = own_heads[layer].tolist().index(sender)
            return (
                offsets["last_heads"] + number
                if layer == last
                else (offsets["early_heads"] + layer * config.n_heads + number)
            )
        receiver = _into_layer(config) - 1
        if site != "mlp_input":
            receiver = HEAD_INPUTS.index(site) * config.n_heads + head
        if layer == last:
            return offsets["last"] + before_last.index(sender) * _into_layer(config) + receiver
        return offsets["early"] + early.index((layer, sender)) * _into_layer(config) + receiver

    return np.array([place(edge) for edge in all_edges(config.n_layers, config.n_heads)])


def _layers_in_window(params: Params, config: DecoderConfig, runs: PairRuns) -> _Layer:
    """Takes what paths are added to from the base run, of every layer, [L, B, W, …]."""
    head_z, post_attn = (in_window(runs.base.trace[name], runs.window_BxW) for name in ("head_z", "post_attn"))

    def mlp_pre(at: tuple[Params, jax.Array]) -> jax.Array:
        block = Block(config).bind({"params": at[0]})
        return block.mlp.fc_in(block.ln_2(at[1]))

    return _Layer(head_z, post_attn, jax.lax.map(mlp_pre, (params["blocks"], post_attn)))


def _receive(
    params: Params,
    config: DecoderConfig,
    base: WindowRun,
    writes: HeadWrites,
    own: _Layer,
    change_BxWxD: jax.Array,
    layer: jax.Array | int,
    queries_BxP: jax.Array | None = None,
) -> jax.Array:
    """Adds a change to each input of a layer alone: the residual stream after the layer, [B, K, P, D].

    The K receivers are every head's query input, then key inputs, value inputs, and the MLP's input.
    """
    block = Block(config).bind({"params": layer_params(params, layer)})
    z_BxSxPxHxE = heads_with_changed_input(config, block, base, change_BxWxD, layer, queries_BxP)
    change_of_z = z_BxSxPxHxE - own.head_z[:, None]

    def of_head(head: jax.Array, change_BxSxPxE: jax.Array) -> tuple[jax.Array, jax.Array]:
        before = own.post_attn[:, None], own.mlp_pre[:, None]
        return writes.change(layer, head, change_BxSxPxE, *before, precision=config.precision)

    resid, mlp_pre = jax.vmap(of_head, in_axes=(0, 3), out_axes=2)(jnp.arange(config.n_heads), change_of_z)
    after = block.from_mlp_hidden(resid, gelu(mlp_pre))  # [B, 3, H, P, D]
    change = change_BxWxD if queries_BxP is None else take_positions(change_BxWxD, queries_BxP, 1)
    through_mlp = _with_mlp_input(block, own.post_attn, own.post_attn + change)[:, None]
    return jnp.concatenate([after.reshape(len(after), -1, *after.shape[3:]), through_mlp], axis=1)


def _through_mlp(
    params: Params,
    config: DecoderConfig,
    post_attn_BxPxD: jax.Array,
    changes_KxBxPxD: jax.Array,
    layer: jax.Array | int,
) -> jax.Array:
    """Adds each change to the input of a layer's MLP: the residual stream after the layer, [B, K, P, D]."""
    block = Block(config).bind({"params": layer_params(params, layer)})
    return _with_mlp_input(block, post_attn_BxPxD[None], post_attn_BxPxD[None] + changes_KxBxPxD).swapaxes(0, 1)


def _with_mlp_input(block: Block, post_attn: jax.Array, mlp_input: jax.Array) -> jax.Array:
    """Computes the residual stream after a layer whose MLP alone has another input."""
    return block.from_mlp_out(post_attn, block.mlp(block.ln_2(mlp_input), NO_TAP))
