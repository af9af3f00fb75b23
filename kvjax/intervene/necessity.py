"""Necessity and sufficiency of component sets: faithfulness, completeness and minimality as sets grow.

On the clean streams of the pairs. A set is *necessary* as far as the metric drops when it is ablated, *sufficient* as
far as it stays when everything outside the set is. Sets are the prefixes of a ranking, and one that is named.

Source: docs/definitions.md, section 9; Wang et al., Interpretability in the wild (2022), for the three criteria.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.intervene.pair_runs import Effects, answer_effects
from kvjax.model.components import Component, all_components
from kvjax.model.decoder import DecoderConfig, Params
from kvjax.model.interventions import Edit, Interventions
from kvjax.model.restart import RESTART_CAPTURE, restart, run_clean
from kvjax.model.sites import Trace, take_positions
from kvjax.task.donors import draw_donors
from kvjax.task.encoding import EncodedRecords
from kvjax.task.pair_encoding import EncodedPairs, PairBucket

BASELINES = ("zero", "mean", "resample")
FAITHFUL = 0.9  # the smallest prefix that reaches this faithfulness is the set whose members are tested

DONOR_SEED = 0


def ablation(heads_LxH: jax.Array, mlps_L: jax.Array, values: Trace, *, n_layers: int, n_heads: int) -> Interventions:
    """Returns the edits that replace the outputs of a set of heads and MLPs, at every position.

    Args:
      heads_LxH, mlps_L: bool, the set.
      values: `head_z` and `mlp_out`, each of the site's axes, of their length or 1.
    """
    assert heads_LxH.shape == (n_layers, n_heads) and mlps_L.shape == (n_layers,)
    return {
        "head_z": Edit(heads_LxH[:, None, None, :, None], values["head_z"]),
        "mlp_out": Edit(mlps_L[:, None, None, None], values["mlp_out"]),
    }


def set_effects(tree: dict, config: DecoderConfig, batch: EncodedPairs, donors_BxT: jax.Array | None) -> Effects:
    """Returns the metric on the clean streams under the ablation of each of K sets, [B, K] each.

    Args:
      tree: one checkpoint's `params`, `sets` (bool [K, components]) and `values`, for `head_z` and `mlp_out`: what
        replaces them, with the sites' axes, or the outputs at every token that donors are named among.
      config: its shape.
      batch: a microbatch of pairs.
      donors_BxT: the token that each position's replacement comes from; None where `values` are what replaces.
    """
    params, sets = tree["params"], tree["sets"]
    tokens = jnp.asarray(batch.clean_tokens)
    logits, clean = run_clean(params, config, tokens, RESTART_CAPTURE)
    values = tree["values"]
    if donors_BxT is not None:
        values = {name: x[:, donors_BxT] for name, x in values.items()}

    def under(chosen: jax.Array) -> Effects:
        by_layer = chosen.reshape(config.n_layers, config.n_heads + 1)
        edits = ablation(by_layer[:, :-1], by_layer[:, -1], values, n_layers=config.n_layers, n_heads=config.n_heads)
        read = restart(params, config, clean, edits, layer=0, positions_BxQ=batch.prediction_positions)
        return answer_effects(read, batch)

    found = jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), jax.lax.map(under, sets))
    full = answer_effects(take_positions(logits, batch.prediction_positions, 1), batch)
    return found | {f"{name}_base": x for name, x in full.items()}


def growing_sets(ranking: np.ndarray) -> np.ndarray:
    """Returns the prefixes of a ranking, from none to all: bool [components + 1, components]."""
    place = np.argsort(ranking)
    return place[None] < np.arange(len(ranking) + 1)[:, None]


def sets_to_ablate(ranking: np.ndarray, named: np.ndarray) -> dict[str, np.ndarray]:
    """Returns every set that curves and criteria need ablated, bool [K, components] by what it is for.

    `necessity`: each prefix of the ranking. `sufficiency`: what lies outside each prefix. `named`: the named set, and
    what lies outside it. `minimality`: what lies outside the named set without each of its members, one after another
    in the order of components.
    """
    prefixes = growing_sets(ranking)
    members = np.flatnonzero(named)
    without = np.tile(~named, (len(members), 1))
    without[np.arange(len(members)), members] = True
    return {
        "necessity": prefixes,
        "sufficiency": ~prefixes,
        "named": np.stack([named, ~named]),
        "minimality": without,
    }


def smallest_faithful(faithfulness: np.ndarray, ranking: np.ndarray) -> np.ndarray:
    """Returns the smallest prefix of a ranking whose faithfulness is at least `FAITHFUL`, bool [components]."""
    reached = np.flatnonzero(np.nan_to_num(faithfulness, nan=-np.inf) >= FAITHFUL)
    return growing_sets(ranking)[reached[0] if len(reached) else len(ranking)]


def named_set(members: Sequence[Component], n_layers: int, n_heads: int) -> np.ndarray:
    """Marks a set's members among all components, bool [components]; raises ValueError for one that is not there."""
    components = all_components(n_layers, n_heads)
    chosen = np.zeros(len(components), bool)
    chosen[[components.index(member) for member in members]] = True
    return chosen


def pair_donors(clean: EncodedRecords, clean_rows: np.ndarray, buckets: Sequence[PairBucket]) -> list[np.ndarray]:
    """Returns, for every position of the pairs' clean streams, the token that resampling takes its outputs from.

    One draw of `draw_donors` over the distinct clean streams: of the same token role, in another stream of the same
    split, whatever the batches.

    Args:
      clean: the distinct clean streams.
      clean_rows: which of them each pair has.
      buckets: the pairs.

    Returns:
      For each bucket, int32 [microbatch, B, T]; a token is named row * length + position.
    """
    (donors,) = draw_donors(clean, draws=1, seed=DONOR_SEED)
    found = []
    for bucket in buckets:
        shape = bucket.batches.clean_tokens.shape
        rows = clean_rows[np.where(bucket.indices < 0, bucket.indices.max(), bucket.indices)]
        found.append(donors[rows, : shape[-1]].reshape(shape).astype(np.int32))
    return found


@functools.partial(jax.jit, static_argnums=0)
def token_outputs(config: DecoderConfig, params: Params, batches: EncodedRecords) -> Trace:
    """Returns what components put out at every token of records in microbatches: [L, tokens, …] by site."""

    def of_batch(batch: EncodedRecords) -> Trace:
        _, clean = run_clean(params, config, batch.tokens, ("head_z", "mlp_out"))
        return {name: clean.trace[name] for name in ("head_z", "mlp_out")}

    by_batch = jax.lax.map(of_batch, batches)  # [M, L, B, T, …]
    return {name: jnp.moveaxis(x, 1, 0).reshape(x.shape[1], -1, *x.shape[4:]) for name, x in by_batch.items()}
