"""Activation patching: one run with an activation of the other, at every place and position (definitions, section 9).

Residual stages, every head's z and every MLP's output; at every position that a change can reach, at all positions of
each role, and at all positions. Nothing before the first changed token differs between the runs, so that only the
positions from there to the last affected read are computed, on top of the base run's keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax.intervene.pair_runs import Direction, Effects, PairRuns, answer_effects, run_pairs
from kvjax.model.decoder import DecoderConfig, Params
from kvjax.model.interventions import Edit
from kvjax.model.sites import SITES, stage_names
from kvjax.model.transforms import over_interventions
from kvjax.sweeps.engine import restart
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
    """Returns every head's z and every MLP's output, by name."""
    places = {}
    for layer in range(n_layers):
        places |= {f"L{layer}H{head}": Place("head_z", layer, head) for head in range(n_heads)}
        places[f"MLP{layer}"] = Place("mlp_out", layer)
    return places


def patch_edit(runs: PairRuns, site: str, layer: jax.Array | int, head: jax.Array | int, where_BxT: jax.Array) -> Edit:
    """Returns the edit that takes a place's activation from the source run at some positions."""
    value = runs.source.trace[site]
    if not SITES[site].per_layer:
        return Edit(where_BxT[:, :, None], value)
    n_layers = len(value)
    mask = (jnp.arange(n_layers) == layer)[:, None, None, None] & where_BxT[None, :, :, None]
    if site == "head_z":
        mask = mask[..., None] & (jnp.arange(value.shape[3]) == head)[None, None, None, :, None]
    return Edit(mask, value)


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
    direction: Direction,
    places: Sequence[Place],
) -> Effects:
    """Returns the effects of patching every place at the positions of `position_masks`, and before the change.

    Args:
      params, config: one checkpoint.
      batch: a microbatch of pairs.
      window: positions computed, from the first changed one on.
      direction: which run is patched.
      places: what to patch.

    Returns:
      Of each of `answer_effects`: `<name>` [B, places, K]; `<name>_base`, `<name>_source` [B]; and
      `<name>_before` [B, places], patched at all positions before the change with nothing left out of the
      computation: a control that must equal the base.
    """
    runs = run_pairs(params, config, batch, direction, window=window)
    masks = position_masks(runs)
    before_BxT = jnp.asarray(batch.roles) == PAIR_ROLES.index("before")

    def effects(place: tuple, mask_BxT: jax.Array, *, site: str, windowed: bool) -> Effects:
        layer, head = place
        logits = restart(
            params,
            config,
            runs.base,
            {site: patch_edit(runs, site, layer, head, mask_BxT)},
            layer=layer,
            positions_BxQ=batch.prediction_positions,
            window_BxW=runs.window_BxW if windowed else None,
        )
        return answer_effects(logits, batch)

    def of_place(layer: jax.Array | int, head: jax.Array, site: str) -> tuple[Effects, Effects]:
        at_masks = over_interventions(lambda mask: effects((layer, head), mask, site=site, windowed=True), lift="map")(
            masks
        )
        return at_masks, effects((layer, head), before_BxT, site=site, windowed=False)

    found: dict[Place, tuple[Effects, Effects]] = {}
    last = config.n_layers - 1
    for site in dict.fromkeys(place.site for place in places):
        own = [place for place in places if place.site == site]
        # The last layer is a program of its own; a site outside the layers is named by layer 0.
        fixed = [place for place in own if place.layer == last or not SITES[site].per_layer]
        traced = [place for place in own if place not in fixed]
        if traced:
            descriptors = tuple(jnp.array(x) for x in zip(*((p.layer, p.head) for p in traced), strict=True))
            both = jax.lax.map(lambda d, s=site: of_place(d[0], d[1], s), descriptors)
            found |= {place: jax.tree.map(lambda x, i=i: x[i], both) for i, place in enumerate(traced)}
        if fixed:
            heads, layer = jnp.array([place.head for place in fixed]), fixed[0].layer
            both = jax.lax.map(lambda head, s=site, at=layer: of_place(at, head, s), heads)
            found |= {place: jax.tree.map(lambda x, i=i: x[i], both) for i, place in enumerate(fixed)}
    result: Effects = {}
    for name in runs.base_effects:
        result[name] = jnp.moveaxis(jnp.stack([found[place][0][name] for place in places]), -1, 0)
        result[f"{name}_before"] = jnp.stack([found[place][1][name] for place in places], axis=-1)
        result[f"{name}_base"], result[f"{name}_source"] = runs.base_effects[name], runs.source_effects[name]
    return result
