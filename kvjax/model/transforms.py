"""Composes forward passes: capture, intervene, and the lifts over interventions and checkpoints.

An analysis is written for one checkpoint and one intervention, as a plain function, and lifted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from kvjax.devices import ONE_DEVICE, Lift, Placement
from kvjax.errors import InputError
from kvjax.model.decoder import Decoder
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.interventions import CLEAN, Interventions, check_interventions, compose
from kvjax.model.params import Params
from kvjax.model.sites import SITES, Trace


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


def over_layers(of_layer: Callable[[jax.Array | int], Any], n_layers: int) -> Any:
    """Runs a function of the layer for every layer, stacked on a leading axis L.

    The last layer is given as a number and is a program of its own, for a restart there computes the prediction
    positions alone. The others are one compiled loop, in which the layer is traced. Layers are never run side by
    side, since a batch of mixed restart layers would run from the lowest for all.
    """
    final = jax.tree.map(lambda x: x[None], of_layer(n_layers - 1))
    if n_layers == 1:
        return final
    earlier = jax.lax.map(of_layer, jnp.arange(n_layers - 1))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), earlier, final)


def over_checkpoints(function: Callable[..., Any], placement: Placement = ONE_DEVICE) -> Callable[..., Any]:
    """Lifts `function(params, *shared)` to parameters stacked on a leading checkpoint axis.

    Args:
      function: of one checkpoint.
      placement: which devices share the checkpoints, as many each; every device has all of `shared`.
    """

    def lifted(stacked_params: Params, *shared: Any) -> Any:
        def one(params: Params) -> Any:
            return function(params, *shared)

        return over_interventions(one, lift=placement.lift)(stacked_params)

    def on_devices(stacked_params: Params, *shared: Any) -> Any:
        split = (True, *(False for _ in shared))
        return placement.on_each_device(lifted, split)(stacked_params, *shared)

    return on_devices
