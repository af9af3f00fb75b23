"""Represents interventions as data: a mask selects the entries of a site's activation that a value replaces.

Zero, mean and resample ablation and patching differ only in the origin of the value, so all are `Edit`s. Masks,
values and the descriptors they are built from are traced: choosing another component needs no recompilation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from kvjax.errors import InputError
from kvjax.model.sites import SITE_ORDER, SITES, take_positions


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


def ablate_head(
    layer: jax.Array | int, head: jax.Array | int, *, n_layers: int, n_heads: int, value: jax.Array | None = None
) -> Interventions:
    """Ablates one head: replaces its attention output z, before the output projection.

    Args:
      layer, head: which head; may be traced.
      n_layers, n_heads: the model's shape.
      value: replaces z, with the axes of `head_z` (each of its length or 1); zero if None.
    """
    mask_LxH = (jnp.arange(n_layers) == layer)[:, None] & (jnp.arange(n_heads) == head)[None]
    return {"head_z": Edit(mask_LxH[:, None, None, :, None], jnp.zeros((1,) * 5) if value is None else value)}


def ablate_mlp(layer: jax.Array | int, *, n_layers: int, value: jax.Array | None = None) -> Interventions:
    """Ablates one MLP: replaces its whole output, bias included.

    Args:
      layer: which MLP; may be traced.
      n_layers: the model's shape.
      value: replaces the output, with the axes of `mlp_out` (each of its length or 1); zero if None.
    """
    mask_L = jnp.arange(n_layers) == layer
    return {"mlp_out": Edit(mask_L[:, None, None, None], jnp.zeros((1,) * 4) if value is None else value)}


def compose(first: Interventions, second: Interventions) -> Interventions:
    """Composes interventions: `first` is applied, then `second`."""
    both = dict(first)
    for site, edit in second.items():
        if site in both:
            before = both[site]
            edit = Edit(before.mask | edit.mask, jnp.where(edit.mask, edit.value, before.value))
        both[site] = edit
    return both


def earliest_site(edits: Interventions) -> str:
    """Finds the edited site that a forward pass reaches first within a layer."""
    return min(edits, key=SITE_ORDER.__getitem__)


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


@dataclasses.dataclass(frozen=True)
class Tap:
    """Called by the model at every site: applies the edits that name the site, and records it if captured.

    Attributes:
      edits: interventions over the whole model.
      layer: the layer the tap sits in, possibly traced; None for sites outside the layers.
      queried_BxP: the positions that are queried; None for all.
      context_BxT: the positions that keys and values are made at; None for all.
      capture: sites to record, after any edit.
      record: receives the captured activations by site.
    """

    edits: Interventions = dataclasses.field(default_factory=dict)
    layer: jax.Array | int | None = None
    queried_BxP: jax.Array | None = None
    context_BxT: jax.Array | None = None
    capture: tuple[str, ...] = ()
    record: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def wants(self, name: str) -> bool:
        """Checks whether the site is edited or captured; some activations are formed only then."""
        return name in self.edits or name in self.capture

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        if name in self.edits:
            edit = self.edits[name]
            x = jnp.where(self._local(name, edit.mask), self._local(name, edit.value), x)
        if name in self.capture:
            self.record[name] = x
        return x

    def _local(self, name: str, array: jax.Array) -> jax.Array:
        """Selects the part of a mask or value that belongs to this layer and these positions."""
        site = SITES[name]
        if site.per_layer:
            # A layer axis of length 1 serves every layer without being copied for each.
            array = array[0] if array.shape[0] == 1 else jax.lax.dynamic_index_in_dim(array, self.layer, 0, False)
        positions = self.queried_BxP if site.queried else self.context_BxT
        if positions is None or array.shape[site.positions] == 1:
            return array
        array = jnp.broadcast_to(array, (positions.shape[0], *array.shape[1:]))
        return take_positions(array, positions, site.positions)


NO_TAP = Tap()
