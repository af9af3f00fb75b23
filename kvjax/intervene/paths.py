"""The direct paths of the model: writers into the residual stream, later readers of it, and the change that is sent.

Senders are the embedding, heads and MLPs; receivers a head's query, key or value input, an MLP's input, or the input of
the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax.intervene.pair_runs import PairRuns
from kvjax.model.components import Component
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params
from kvjax.model.sites import SITES, Trace, take_positions
from kvjax.model.weights import head_output_kernels

HEAD_INPUTS = ("query_input", "key_input", "value_input")


class Sender(NamedTuple):
    """A writer into the residual stream: `embedding`, a `head` or an `mlp`."""

    kind: str
    layer: int = -1
    head: int = 0

    @property
    def name(self) -> str:
        if self.kind == "embedding":
            return self.kind
        return str(Component(self.layer, self.head if self.kind == "head" else None))


class Receiver(NamedTuple):
    """A reader of the residual stream, by the site of its input; one head's if it is a head."""

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
    """A direct path from a sender to a later receiver."""

    sender: Sender
    receiver: Receiver


def all_senders(n_layers: int, n_heads: int) -> tuple[Sender, ...]:
    """Lists every sender in forward order: the embedding, then each layer's heads and MLP."""
    senders = [Sender("embedding")]
    for layer in range(n_layers):
        senders += [Sender("head", layer, head) for head in range(n_heads)] + [Sender("mlp", layer)]
    return tuple(senders)


def all_edges(n_layers: int, n_heads: int) -> tuple[Edge, ...]:
    """Yields every sender with every receiver after it; a head reaches the MLP of its layer, but not its heads."""
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


def run_changes(runs: PairRuns, positions_BxW: jax.Array | None = None) -> Trace:
    """Subtracts the base run's outputs from the source run's, at some positions or all.

    Returns:
      `embedding` [B, T, D], `head_z` [L, B, T, H, E] and `mlp_out` [L, B, T, D]; W positions instead of T if given.
    """
    changes = {name: runs.source.trace[name] - runs.base.trace[name] for name in ("embedding", "head_z", "mlp_out")}
    if positions_BxW is None:
        return changes

    def within(name: str, x: jax.Array) -> jax.Array:
        if SITES[name].per_layer:
            return jax.vmap(lambda of_layer: take_positions(of_layer, positions_BxW, 1))(x)
        return take_positions(x, positions_BxW, 1)

    return {name: within(name, x) for name, x in changes.items()}


def sender_changes(params: Params, config: DecoderConfig, changes: Trace) -> jax.Array:
    """Forms each sender's output in the source run minus that in the base run, [senders, B, T, D].

    A head's output is its z through its own part of the output projection, without the bias.

    Args:
      params, config: one checkpoint.
      changes: from `run_changes`.
    """
    kernel_LxHxExD = head_output_kernels(params, config.n_heads)
    written = jnp.einsum("lbthe,lhed->lhbtd", changes["head_z"], kernel_LxHxExD, precision=config.precision)
    by_layer = jnp.concatenate([written, changes["mlp_out"][:, None]], axis=1)  # [L, H + 1, B, T, D]
    return jnp.concatenate([changes["embedding"][None], by_layer.reshape(-1, *by_layer.shape[2:])])
