"""Activation patching: one run with an activation of the other, at every place and position (definitions, section 9).

Residual stages, every head's z and every MLP's output; at every position that a change can reach, at all positions of
each role, and at all positions. Nothing before the first changed token differs between the runs, so that only the
positions from there to the last affected read are computed, on top of the base run's keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax.intervene.pair_runs import Effects, PairRuns, effects_under, run_pairs, with_runs
from kvjax.model.components import all_components
from kvjax.model.decoder import DecoderConfig, Params
from kvjax.model.interventions import Edit, Interventions
from kvjax.model.restart import CleanRun
from kvjax.model.sites import SITES, stage_names
from kvjax.task.corruption import PAIR_ROLES
from kvjax.task.pair_encoding import EncodedPairs


class Place(NamedTuple):
    """Where an activation is replaced: a site, in a layer and head where it has them."""

    site: str
    layer: int = 0
    head: int = 0


def stage_places(n_layers: int) -> dict[str, Place]:
    """Returns the residual stages in order, by name."""
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
    """Returns which residual stage a site of a layer is, among the 2L + 2; `layer` may be traced."""
    return {"embedding": 0, "post_attn": 1 + 2 * layer, "post_mlp": 2 + 2 * layer, "final_norm": 2 * n_layers + 1}[site]


def over_places(
    places: Sequence[tuple], n_layers: int, function: Callable[..., Effects | tuple[Effects, ...]]
) -> Effects | tuple[Effects, ...]:
    """Returns what a function gives at each place, stacked on a leading axis.

    Places of one site are one compiled loop over layers; those of the last layer, whose restart is a program of its
    own, are another.

    Args:
      places: site, layer and whatever else tells places apart, as numbers: a `Place`, or with a sender.
      n_layers: the model's.
      function: of site, layer (traced, or the last one's number) and the other numbers (traced).
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
    """Returns where an edit of a place applies, of the site's rank; only `head_z` looks at the head."""
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
    """Returns the edit that takes a place's activation from another run at some positions."""
    return {site: Edit(place_mask(config, site, layer, head, where_BxT), source.trace[site])}


def position_masks(runs: PairRuns) -> jax.Array:
    """Returns where to patch, bool [K, B, T]: each position of the window, then those of each role, then all.

    Roles are `PAIR_ROLES` but the first, `before`, which lies outside the window.
    """
    batch, window = runs.batch, runs.window_BxW.shape[1]
    positions = jnp.arange(batch.clean_tokens.shape[1])
    offsets_BxT = positions[None] - batch.first_changed[:, None]
    reached_BxT = positions[None] <= batch.last_affected[:, None]
    single = (offsets_BxT[None] == jnp.arange(window)[:, None, None]) & reached_BxT[None]
    by_role = jnp.asarray(batch.roles)[None] == jnp.arange(1, len(PAIR_ROLES))[:, None, None]
    return jnp.concatenate([single, by_role, jnp.ones((1, *offsets_BxT.shape), bool)])


def patching_effects(
    params: Params,
    config: DecoderConfig,
    batch: EncodedPairs,
    *,
    window: int,
    direction: jax.Array | int,
    places: Sequence[Place],
) -> Effects:
    """Returns the effects of patching every place at the positions of `position_masks`, and before the change.

    Args:
      params, config: one checkpoint.
      batch: a microbatch of pairs.
      window: positions computed, from the first changed one on.
      direction: which run is patched, an index into `DIRECTIONS`; may be traced.
      places: what to patch.

    Returns:
      Of each of `answer_effects`: `<name>` [B, places, K]; `<name>_base`, `<name>_source` [B]; and
      `<name>_before` [B, places], patched at all positions before the change with nothing left out of the
      computation: a control that must equal the base.
    """
    runs = run_pairs(params, config, batch, direction, window=window)
    masks = position_masks(runs)
    before_BxT = jnp.asarray(batch.roles) == PAIR_ROLES.index("before")

    def patched(site: str, layer: jax.Array | int, head: jax.Array, mask_BxT: jax.Array, *, windowed: bool) -> Effects:
        edits = patch_edit(config, runs.source, site, layer, head, mask_BxT)
        return effects_under(params, config, runs, edits, layer, windowed=windowed)

    def of_place(site: str, layer: jax.Array | int, head: jax.Array) -> tuple[Effects, Effects]:
        at_masks = jax.lax.map(lambda mask: patched(site, layer, head, mask, windowed=True), masks)
        return at_masks, patched(site, layer, head, before_BxT, windowed=False)

    at_masks, before = over_places(places, config.n_layers, of_place)
    result = {name: jnp.moveaxis(x, -1, 0) for name, x in at_masks.items()}
    return with_runs(result | {f"{name}_before": x.T for name, x in before.items()}, runs)
