"""Transforms that compose: capture, intervene, and the lifts over interventions and checkpoints.

An analysis is written for one checkpoint and one intervention, as a plain function, and lifted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from kvjax.errors import InputError
from kvjax.model.decoder import Decoder, DecoderConfig, Params
from kvjax.model.interventions import CLEAN, Interventions, check_interventions, compose
from kvjax.model.sites import SITES, Trace

Lift = Literal["map", "vmap"]

CHECKPOINT_AXIS = "checkpoint"


class Apply(Protocol):
    """A model: parameters and tokens [B, T] to logits [B, T, V] and the captured activations."""

    def __call__(
        self,
        params: Params,
        tokens_BxT: jax.Array,
        *,
        edits: Interventions = CLEAN,
        capture: tuple[str, ...] = (),
    ) -> tuple[jax.Array, Trace]: ...


def plain_forward(config: DecoderConfig) -> Apply:
    """Makes the plain, unrestarted forward pass: the model itself, and the oracle of every faster path."""

    def apply(params, tokens_BxT, *, edits=CLEAN, capture=()):
        check_interventions(edits)
        if ("unembedding" in params) == config.tied:
            expected, found = ("a tied", "one of its own") if config.tied else ("an own", "none")
            raise InputError(f"parameters: expected {expected} unembedding as the config says; found {found}")
        unknown = set(capture) - set(SITES)
        if unknown:
            raise KeyError(f"expected sites among {', '.join(SITES)}; found {', '.join(sorted(unknown))}")
        return Decoder(config).apply({"params": params}, tokens_BxT, edits, capture)

    return apply


def capture(apply: Apply, sites: tuple[str, ...]) -> Apply:
    """Makes `apply` also capture the named sites."""

    @functools.wraps(apply)
    def captured(params, tokens_BxT, *, edits=CLEAN, capture=()):
        return apply(params, tokens_BxT, edits=edits, capture=tuple(dict.fromkeys((*sites, *capture))))

    return captured


def intervene(apply: Apply, edits: Interventions) -> Apply:
    """Makes `apply` intervene by `edits`; edits given at the call are applied after them."""
    earlier = edits

    @functools.wraps(apply)
    def intervened(params, tokens_BxT, *, edits=CLEAN, capture=()):
        return apply(params, tokens_BxT, edits=compose(earlier, edits), capture=capture)

    return intervened


def over_interventions(function: Callable[[Any], Any], *, lift: Lift) -> Callable[[Any], Any]:
    """Lifts `function` of one descriptor to K of them, stacked on their leading axis.

    The descriptor is small (layer, head, …); the function builds its `Edit`s from it, so no activation-sized value
    exists per intervention. `map` runs them one after another in one compiled loop, `vmap` side by side.
    """
    return functools.partial(jax.lax.map, function) if lift == "map" else jax.vmap(function)


def over_checkpoints(function: Callable[..., Any], *, lift: Lift, devices: int = 1) -> Callable[..., Any]:
    """Lifts `function(params, *shared)` to parameters stacked on a leading checkpoint axis.

    Args:
      function: of one checkpoint.
      lift: `map` runs the checkpoints of a device one after another, `vmap` side by side.
      devices: how many devices share the checkpoint axis, which must be a multiple of it; each has all of `shared`.
    """

    def lifted(stacked_params: Params, *shared: Any) -> Any:
        def one(params: Params) -> Any:
            return function(params, *shared)

        return jax.lax.map(one, stacked_params) if lift == "map" else jax.vmap(one)(stacked_params)

    if devices == 1:
        return lifted

    def sharded(stacked_params: Params, *shared: Any) -> Any:
        specs = (PartitionSpec(CHECKPOINT_AXIS), *(PartitionSpec() for _ in shared))
        mesh, out = checkpoint_mesh(devices), PartitionSpec(CHECKPOINT_AXIS)
        return jax.shard_map(lifted, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(stacked_params, *shared)

    return sharded


def checkpoint_mesh(devices: int) -> Mesh:
    """Makes the mesh whose one axis shares checkpoints among the first `devices` devices."""
    return Mesh(np.array(jax.local_devices()[:devices]), (CHECKPOINT_AXIS,))
