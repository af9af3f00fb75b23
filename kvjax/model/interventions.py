"""An intervention is data: where a mask says so, a site's activation is replaced by a value.

Zero, mean and resample ablation and patching differ only in where the value comes from, so all are `Edit`s. Masks,
values and the descriptors they are built from are traced: choosing another component needs no recompilation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from kvjax.errors import InputError
from kvjax.model.sites import SITES, take_positions

Tap = Callable[[str, jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edit:
    """Replaces a site's activation by `value` where `mask` is true.

    Attributes:
      mask: bool, of the site's rank (layer axis included), every axis of its length or 1.
      value: float, likewise.
    """

    mask: jax.Array
    value: jax.Array


# Site name -> Edit. A site that is absent costs nothing; the empty mapping is the clean program.
Interventions = Mapping[str, Edit]

CLEAN: Interventions = {}


def ablate_head(layer: jax.Array | int, head: jax.Array | int, *, n_layers: int, n_heads: int) -> Interventions:
    """Returns the zero ablation of one head: its attention output, before the output projection, becomes 0.

    Args:
      layer, head: which head; may be traced.
      n_layers, n_heads: the model's shape.
    """
    mask_LxH = (jnp.arange(n_layers) == layer)[:, None] & (jnp.arange(n_heads) == head)[None]
    return {"head_z": Edit(mask_LxH[:, None, None, :, None], jnp.zeros((1, 1, 1, 1, 1)))}


def ablate_mlp(layer: jax.Array | int, *, n_layers: int) -> Interventions:
    """Returns the zero ablation of one MLP: its whole output, bias included, becomes 0; `layer` may be traced."""
    mask_L = jnp.arange(n_layers) == layer
    return {"mlp_out": Edit(mask_L[:, None, None, None], jnp.zeros((1, 1, 1, 1)))}


def compose(first: Interventions, second: Interventions) -> Interventions:
    """Returns the interventions that apply `first`, then `second`."""
    both = dict(first)
    for site, edit in second.items():
        if site in both:
            before = both[site]
            edit = Edit(before.mask | edit.mask, jnp.where(edit.mask, edit.value, before.value))
        both[site] = edit
    return both


def check_interventions(edits: Interventions) -> None:
    """Raises `InputError` for a site that does not exist, or an edit whose rank is not the site's."""
    for name, edit in edits.items():
        if name not in SITES:
            raise InputError(f"interventions: expected a site among {', '.join(SITES)}; found {name}")
        rank = len(SITES[name].axes)
        for part, array in (("mask", edit.mask), ("value", edit.value)):
            if jnp.ndim(array) != rank:
                raise InputError(
                    f"interventions: expected {name}.{part} with axes {SITES[name].axes}; found rank {jnp.ndim(array)}"
                )


def editing_tap(
    edits: Interventions, layer: jax.Array | int | None = None, positions_BxQ: jax.Array | None = None
) -> Tap:
    """Returns the function a block calls at every site: identity where no edit names it.

    Args:
      edits: interventions over the whole model.
      layer: the layer the tap sits in, possibly traced; None for sites outside the layers.
      positions_BxQ: the positions the block computes, where it does not compute all.
    """

    def tap(name: str, x: jax.Array) -> jax.Array:
        if name not in edits:
            return x
        edit, site = edits[name], SITES[name]

        def local(array: jax.Array) -> jax.Array:
            if site.per_layer:
                # A layer axis of length 1 serves every layer without being copied for each.
                array = array[0] if array.shape[0] == 1 else jax.lax.dynamic_index_in_dim(array, layer, 0, False)
            if positions_BxQ is None or array.shape[site.positions] == 1:
                return array
            array = jnp.broadcast_to(array, (positions_BxQ.shape[0], *array.shape[1:]))
            return take_positions(array, positions_BxQ, site.positions)

        return jnp.where(local(edit.mask), local(edit.value), x)

    return tap


def recording_tap(tap: Tap, sites: tuple[str, ...], record: dict[str, jax.Array]) -> Tap:
    """Returns `tap`, which also stores what comes out of it at the named sites in `record`."""

    def recorded(name: str, x: jax.Array) -> jax.Array:
        x = tap(name, x)
        if name in sites:
            record[name] = x
        return x

    return recorded
