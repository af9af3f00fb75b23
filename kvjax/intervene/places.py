"""The places whose activations are replaced: residual stages, every head's z and every MLP's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax.intervene.pair_runs import Effects
from kvjax.model.components import all_components
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.interventions import Edit, Interventions
from kvjax.model.restart import CleanRun
from kvjax.model.sites import SITES, stage_names


class Place(NamedTuple):
    """A site whose activation is replaced, in one layer and head if the site has them."""

    site: str
    layer: int = 0
    head: int = 0


def stage_places(n_layers: int) -> dict[str, Place]:
    """Lists the residual stages in order, by name."""
    places = {"embedding": Place("embedding")}
    for layer in range(n_layers):
        places |= {f"layer_{layer}_{half}": Place(half, layer) for half in ("post_attn", "post_mlp")}
    places["final_norm"] = Place("final_norm")
    assert tuple(places) == stage_names(n_layers)
    return places


def component_places(n_layers: int, n_heads: int) -> dict[str, Place]:
    """Lists every head's z and every MLP's output in forward order, by the component's spelling."""
    return {
        str(component): Place("mlp_out" if component.is_mlp else "head_z", component.layer, component.head or 0)
        for component in all_components(n_layers, n_heads)
    }


def stage_index(site: str, layer: jax.Array | int, n_layers: int) -> jax.Array | int:
    """Numbers the residual stage of a site, among the 2L + 2; `layer` may be traced."""
    return {"embedding": 0, "post_attn": 1 + 2 * layer, "post_mlp": 2 + 2 * layer, "final_norm": 2 * n_layers + 1}[site]


def over_places(
    places: Sequence[tuple], n_layers: int, function: Callable[..., Effects | tuple[Effects, ...]]
) -> Effects | tuple[Effects, ...]:
    """Runs a function at each place, stacked on a leading axis.

    Places of one site are one compiled loop over layers; those of the last layer, whose restart is a program of its
    own, are another.

    Args:
      places: tuples of a site, a layer and further numbers, such as `Place`s.
      n_layers: layers of the model.
      function: takes the site, the layer (traced, or the last one's number) and the further numbers (traced).
    """
    found: dict[tuple, Effects | tuple[Effects, ...]] = {}
    last = n_layers - 1
    for site in dict.fromkeys(place[0] for place in places):
        own = [place for place in places if place[0] == site]
        # A site outside the layers has no layer to trace.
        fixed = [place for place in own if place[1] == last or not SITES[site].per_layer]
        traced = [place for place in own if place not in fixed]
        for group, is_traced in ((traced, True), (fixed, False)):
            if group:
                _, *columns = zip(*group, strict=True)
                numbers = tuple(map(jnp.array, columns))

                def one(at: tuple, site: str = site, fixed_layer: int | None = None if is_traced else group[0][1]):
                    return function(site, at[0] if fixed_layer is None else fixed_layer, *at[1:])

                each = jax.lax.map(one, numbers)
                found |= {place: jax.tree.map(lambda x, i=i: x[i], each) for i, place in enumerate(group)}
    return jax.tree.map(lambda *x: jnp.stack(x), *(found[place] for place in places))


def place_mask(
    config: DecoderConfig, site: str, layer: jax.Array | int, head: jax.Array | int, where_BxT: jax.Array
) -> jax.Array:
    """Makes the mask of a place at some positions, of the site's rank; only `head_z` looks at the head."""
    if not SITES[site].per_layer:
        return where_BxT[:, :, None]
    mask = (jnp.arange(config.n_layers) == layer)[:, None, None, None] & where_BxT[None, :, :, None]
    if site == "head_z":
        mask = mask[..., None] & (jnp.arange(config.n_heads) == head)[None, None, None, :, None]
    return mask


def patch_edit(
    config: DecoderConfig,
    source: CleanRun,
    site: str,
    layer: jax.Array | int,
    head: jax.Array | int,
    where_BxT: jax.Array,
) -> Interventions:
    """Makes the edit that takes a place's activation from another run at some positions."""
    return {site: Edit(place_mask(config, site, layer, head, where_BxT), source.trace[site])}
