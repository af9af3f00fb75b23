"""Path patching: what flows from one component to another along the direct path alone (definitions, section 9).

The receiver's input gets the difference of the sender's output between the two runs. Everything before the receiver
stays as in the base run, the receiver and everything after it are computed again; so each pair of sender and receiver
is one restart in the receiver's layer, from activations both runs have kept.

Source: Goldowsky-Dill et al., Localizing model behavior with path patching (2023); Wang et al., Interpretability in the
wild (2022).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax.intervene.pair_runs import Effects, PairRuns, effects_under, run_pairs, with_runs
from kvjax.intervene.patching import over_places
from kvjax.model.components import Component
from kvjax.model.decoder import DecoderConfig, Params
from kvjax.model.interventions import Edit, Interventions
from kvjax.model.restart import before_layer
from kvjax.model.weights import head_output_kernels
from kvjax.task.pair_encoding import EncodedPairs

HEAD_INPUTS = ("query_input", "key_input", "value_input")


class Sender(NamedTuple):
    """What writes into the residual stream: `embedding`, a `head` or an `mlp`."""

    kind: str
    layer: int = -1
    head: int = 0

    @property
    def name(self) -> str:
        if self.kind == "embedding":
            return self.kind
        return str(Component(self.layer, self.head if self.kind == "head" else None))


class Receiver(NamedTuple):
    """What reads it: a head's query, key or value input, an MLP's input, or that of the logits, as a site."""

    site: str
    layer: int = 0
    head: int = 0

    @property
    def name(self) -> str:
        if self.site == "logits_input":
            return "logits"
        if self.site == "mlp_input":
            return str(Component(self.layer))
        return f"{Component(self.layer, self.head)}.{self.site.removesuffix('_input')}"


class Edge(NamedTuple):
    """A direct path."""

    sender: Sender
    receiver: Receiver


def all_senders(n_layers: int, n_heads: int) -> tuple[Sender, ...]:
    """Returns every sender in forward order: the embedding, then each layer's heads and MLP."""
    senders = [Sender("embedding")]
    for layer in range(n_layers):
        senders += [Sender("head", layer, head) for head in range(n_heads)] + [Sender("mlp", layer)]
    return tuple(senders)


def all_edges(n_layers: int, n_heads: int) -> tuple[Edge, ...]:
    """Returns every sender with every receiver after it: a head's own layer's MLP, but not its heads."""
    return tuple(_edges(n_layers, n_heads))


def _edges(n_layers: int, n_heads: int) -> Iterator[Edge]:
    for sender in all_senders(n_layers, n_heads):
        for layer in range(n_layers):
            if sender.layer < layer:
                for head in range(n_heads):
                    yield from (Edge(sender, Receiver(site, layer, head)) for site in HEAD_INPUTS)
            if sender.layer < layer or (sender.kind, sender.layer) == ("head", layer):
                yield Edge(sender, Receiver("mlp_input", layer))
        yield Edge(sender, Receiver("logits_input"))


def sender_changes(params: Params, config: DecoderConfig, runs: PairRuns) -> jax.Array:
    """Returns each sender's output in the source run minus that in the base run, [senders, B, T, D].

    A head's output is what its part of the output projection makes of its z, without the bias.
    """

    def change(site: str) -> jax.Array:
        return runs.source.trace[site] - runs.base.trace[site]

    kernel_LxHxExD = head_output_kernels(params, config.n_heads)
    written = jnp.einsum("lbthe,lhed->lhbtd", change("head_z"), kernel_LxHxExD, precision=config.precision)
    by_layer = jnp.concatenate([written, change("mlp_out")[:, None]], axis=1)  # [L, H + 1, B, T, D]
    return jnp.concatenate([change("embedding")[None], by_layer.reshape(-1, *by_layer.shape[2:])])


def path_edits(
    runs: PairRuns, config: DecoderConfig, site: str, layer: jax.Array | int, head: jax.Array | int, change: jax.Array
) -> Interventions:
    """Returns the edit of a receiver's input that adds a change [B, T, D] to what the base run has there."""
    one_layer = jnp.arange(config.n_layers) == layer
    if site == "logits_input":
        return {site: Edit(jnp.ones((1, 1, 1), bool), runs.base.trace["post_mlp"][-1] + change)}
    if site == "mlp_input":
        post_attn = jax.lax.dynamic_index_in_dim(runs.base.trace["post_attn"], layer, 0, keepdims=False)
        return {site: Edit(one_layer[:, None, None, None], (post_attn + change)[None])}
    mask = one_layer[:, None, None, None, None] & (jnp.arange(config.n_heads) == head)[None, None, None, :, None]
    value = before_layer(runs.base.trace, layer) + change
    return {site: Edit(mask, value[None, :, :, None, :])}


def path_effects(
    params: Params, config: DecoderConfig, batch: EncodedPairs, *, window: int, direction: jax.Array | int
) -> Effects:
    """Returns the effects of patching every direct path.

    Args:
      params, config: one checkpoint.
      batch: a microbatch of pairs.
      window: positions computed, from the first changed one on.
      direction: which run is patched, an index into `DIRECTIONS`; may be traced.

    Returns:
      Of each of `answer_effects`: `<name>` [B, edges] in the order of `all_edges`; `<name>_base`, `<name>_source` [B].
    """
    runs = run_pairs(params, config, batch, direction, window=window)
    changes = sender_changes(params, config, runs)

    def along(site: str, layer: jax.Array | int, head: jax.Array, sender: jax.Array) -> Effects:
        edits = path_edits(runs, config, site, layer, head, changes[sender])
        return effects_under(params, config, runs, edits, layer)

    senders = all_senders(config.n_layers, config.n_heads)
    edges = [(*edge.receiver, senders.index(edge.sender)) for edge in all_edges(config.n_layers, config.n_heads)]
    found = over_places(edges, config.n_layers, along)
    return with_runs({name: x.T for name, x in found.items()}, runs)
