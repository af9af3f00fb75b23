"""Path patching: what flows from one component to another along the direct path alone.

The receiver's input gets the difference of the sender's output between the two runs. Everything before the receiver
stays as in the base run, the receiver and everything after it are computed again; so each pair of sender and receiver
is one restart in the receiver's layer, from activations both runs have kept.

Definitions: docs/definitions.md, "Interventions". Source: Goldowsky-Dill et al., Localizing model behavior with path
patching (2023); Wang et al., Interpretability in the wild (2022).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from kvjax.execution.over_pairs import PairBatch
from kvjax.intervene.inputs import ANSWER_ACCURACY, InterventionInputs, Outcome
from kvjax.intervene.kinds.kind import Kind
from kvjax.intervene.pair_runs import (
    DENOISING,
    DIRECTIONS,
    Effects,
    PairRuns,
    both_directions,
    effects_under,
    run_pairs,
    with_runs,
)
from kvjax.intervene.pair_tables import (
    PAIR_METRIC,
    RECOVERY,
    baselines,
    each_direction,
    largest_recoveries,
    metric_recoveries,
    of_metrics,
    put_runs,
)
from kvjax.intervene.paths import all_edges, all_senders, run_changes, sender_changes
from kvjax.intervene.places import over_places
from kvjax.intervene.recovery import means_per_read
from kvjax.intervene.summary_text import center_step, largest_by_pair_kind, run_lines
from kvjax.model.decoder import DecoderConfig, Params
from kvjax.model.interventions import Edit, Interventions
from kvjax.model.restart import before_layer
from kvjax.task.pair_encoding import EncodedPairs


def path_edits(
    runs: PairRuns, config: DecoderConfig, site: str, layer: jax.Array | int, head: jax.Array | int, change: jax.Array
) -> Interventions:
    """Makes the edit that adds a change [B, T, D] to a receiver's input in the base run."""
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
    """Patches every direct path.

    Args:
      params, config: one checkpoint.
      batch: a microbatch of pairs.
      window: positions computed, from the first changed one on.
      direction: which run is patched, an index into `DIRECTIONS`; may be traced.

    Returns:
      Of each of `answer_effects`: `<name>` [B, edges] in the order of `all_edges`; `<name>_base`, `<name>_source` [B].
    """
    runs = run_pairs(params, config, batch, direction, window=window)
    changes = sender_changes(params, config, run_changes(runs))

    def along(site: str, layer: jax.Array | int, head: jax.Array, sender: jax.Array) -> Effects:
        edits = path_edits(runs, config, site, layer, head, changes[sender])
        return effects_under(params, config, runs, edits, layer)

    senders = all_senders(config.n_layers, config.n_heads)
    edges = [(*edge.receiver, senders.index(edge.sender)) for edge in all_edges(config.n_layers, config.n_heads)]
    found = over_places(edges, config.n_layers, along)
    return with_runs({name: x.T for name, x in found.items()}, runs)


@dataclasses.dataclass(frozen=True)
class PatchPaths:
    """The measurement: every direct path patched, in both directions."""

    config: DecoderConfig

    def __call__(self, params: Params, batch: PairBatch) -> Effects:
        """Runs `path_effects`, [B, directions, …]."""

        def one(direction: jax.Array) -> Effects:
            return path_effects(params, self.config, batch.pairs, window=batch.window, direction=direction)

        return both_directions(one)


def analyse(inputs: InterventionInputs) -> Outcome:
    """Patches every direct path, in both directions."""
    edges = all_edges(inputs.config.n_layers, inputs.config.n_heads)
    by_direction = each_direction(inputs.over_pairs.run(PatchPaths(inputs.config), inputs.stacked))
    names = [f"{edge.sender.name}->{edge.receiver.name}" for edge in edges]
    dataset = inputs.dataset(direction=DIRECTIONS, path=names, pair=inputs.pair_ids)
    dataset["sender"] = ("path", [edge.sender.name for edge in edges])
    dataset["receiver"] = ("path", [edge.receiver.name for edge in edges])
    found = np.stack([metric_recoveries(inputs.groups, arrays, arrays) for arrays in by_direction], axis=2)
    dims = ("direction", "pair_kind", "step", "path")
    dataset["recovery"] = (("statistic", "metric", *dims), found, RECOVERY)
    accuracy = np.stack([means_per_read(inputs.groups, a["clean_correct"]) for a in by_direction], axis=1)
    dataset["clean_answer_accuracy"] = (("statistic", *dims), accuracy, ANSWER_ACCURACY)
    stacked = np.stack([of_metrics(arrays) for arrays in by_direction], axis=1)
    dataset["metric_by_path"] = (("metric", "direction", "step", "pair", "path"), stacked, PAIR_METRIC)
    put_runs(dataset, inputs, by_direction[DENOISING], clean="source", corrupted="base")
    return Outcome(dataset, summarise(dataset, inputs.metric) | {"controls": {}})


def summarise(dataset: xr.Dataset, metric: str) -> dict[str, Any]:
    """Summarises the largest recoveries of a metric along one path."""
    return baselines(dataset, metric) | {"effects": {"paths": largest_recoveries(dataset, "", {}, metric)}}


def summary_lines(document: Mapping[str, Any]) -> list[str]:
    """Writes both runs, and the paths of the largest recovery."""
    step = center_step(document)
    return [
        *run_lines(document, [step]),
        f"recovery of {document['metric'].replace('_', ' ')} at step {step} along one direct path, the largest:",
        *largest_by_pair_kind(document, document["effects"]["paths"], lambda e: e["path"]),
    ]


KIND = Kind("path_patching", analyse, summary_lines, summarise=summarise)
