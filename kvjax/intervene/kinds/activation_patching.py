"""Activation patching: one run with an activation of the other, at every place and position.

Residual stages, every head's z and every MLP's output; at every position that a change can reach, at all positions of
each role, and at all positions. Nothing before the first changed token differs between the runs, so that only the
positions from there to the last affected read are computed, on top of the base run's keys and values.

Definitions: docs/definitions.md, "Interventions".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from kvjax.execution.over_pairs import PairBatch
from kvjax.intervene.inputs import ANSWER_ACCURACY, InterventionInputs, Outcome, numbers
from kvjax.intervene.kinds.kind import Kind
from kvjax.intervene.metrics import METRICS
from kvjax.intervene.pair_runs import (
    DENOISING,
    DIRECTIONS,
    Effects,
    PairRuns,
    both_directions,
    run_streams,
    with_runs,
)
from kvjax.intervene.pair_tables import (
    PAIR_METRIC,
    RECOVERY,
    baselines,
    beside_recovery,
    component_table,
    each_direction,
    largest_recoveries,
    metric_recoveries,
    of_metrics,
    put_runs,
)
from kvjax.intervene.patched_positions import differs_before, patched_before, patched_positions, single_rows
from kvjax.intervene.places import Place, component_places, stage_places
from kvjax.intervene.recovery import means_per_read
from kvjax.intervene.summary_text import cell, center_step, component_lines, failure, run_lines, shown_steps
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params
from kvjax.task.corruption import PAIR_ROLES

ROLES = (*PAIR_ROLES[1:], "all", PAIR_ROLES[0])


def patching_effects(
    params: Params, config: DecoderConfig, runs: PairRuns, places: Sequence[Place], several: int
) -> Effects:
    """Patches every place at each position of the window, at those of each role, and at all.

    Args:
      params, config: one checkpoint.
      runs: both runs of a microbatch of pairs.
      places: what to patch.
      several: how many roles of one pair have more than one position, at most.

    Returns:
      Of each of `answer_effects`: `<name>` [B, places, K] in the order of the window's positions, `PAIR_ROLES` but the
      first, and all; `<name>_base`, `<name>_source` [B]. `differs_before` [B]: whether an activation of a place differs
      between the runs before the change.
    """
    found = patched_positions(params, config, runs, places, several)
    return with_runs(found, runs) | {"differs_before": differs_before(runs, places)}


@dataclasses.dataclass(frozen=True)
class PatchPlaces:
    """The measurement: every place patched, in both directions."""

    config: DecoderConfig
    places: tuple[Place, ...]

    def __call__(self, params: Params, batch: PairBatch) -> Effects:
        """Runs `patching_effects` for each direction, [B, directions, …]."""
        runs = run_streams(params, self.config, batch.pairs, window=batch.window)
        return both_directions(
            lambda at: patching_effects(params, self.config, runs.towards(at), self.places, batch.several)
        )


@dataclasses.dataclass(frozen=True)
class PatchBefore:
    """The measurement: every place patched before the change, in both directions."""

    config: DecoderConfig
    places: tuple[Place, ...]

    def __call__(self, params: Params, batch: PairBatch) -> Effects:
        """Runs `patched_before` for each direction, [B, directions, places]."""
        runs = run_streams(params, self.config, batch.pairs, window=batch.window)
        return both_directions(lambda at: patched_before(params, self.config, runs.towards(at), self.places))


def _measure(inputs: InterventionInputs, places: tuple[Place, ...]) -> dict[str, np.ndarray]:
    """Patches places in every pair at every checkpoint, [C, N, directions, …].

    Patches before the change are a control. If no activation differs there by a bit, they change nothing, and their
    effects, `<name>_before` [C, N, directions, places], are the base run's. Otherwise the whole model is run with each.
    """
    arrays = inputs.over_rows(single_rows).run(PatchPlaces(inputs.config, places), inputs.stacked)
    if arrays.pop("differs_before").any():
        before = inputs.over_pairs.run(PatchBefore(inputs.config, places), inputs.stacked)
    else:
        base = {name: arrays[f"{name}_base"] for name in (*METRICS, "clean_correct")}
        before = {name: np.broadcast_to(x[..., None], (*x.shape, len(places))) for name, x in base.items()}
    return arrays | {f"{name}_before": x for name, x in before.items()}


def analyse(inputs: InterventionInputs) -> Outcome:
    """Patches every stage, head and MLP at every position and role, in both directions."""
    stages, components = (
        stage_places(inputs.config.n_layers),
        component_places(inputs.config.n_layers, inputs.config.n_heads),
    )
    places = stages | components
    length = inputs.encoded.clean_tokens.shape[1]
    by_direction = each_direction(_measure(inputs, tuple(places.values())))
    dataset = inputs.dataset(
        direction=DIRECTIONS, place=places, position_role=ROLES, position=range(length), pair=inputs.pair_ids
    )
    dataset.coords["is_component"] = ("place", [name in components for name in places])
    by_role, by_position = [], []
    for arrays in by_direction:
        role, position = {}, {}
        for name in (*METRICS, "clean_correct"):
            single, masked = split_positions(arrays[name], len(PAIR_ROLES))
            role[name] = np.concatenate([masked, arrays[f"{name}_before"][..., None]], axis=-1)
            position[name] = _at_positions(inputs, single, arrays[f"{name}_base"], length)
        by_role.append(role)
        by_position.append(position)

    def recovery(found: list[dict[str, np.ndarray]]) -> np.ndarray:
        pieces = zip(found, by_direction, strict=True)
        return np.stack([metric_recoveries(inputs.groups, x, arrays) for x, arrays in pieces], axis=2)

    dims = ("direction", "pair_kind", "step", "place")
    for name, found in (("position_role", by_role), ("position", by_position)):
        short = name.removeprefix("position_")
        accuracy = np.stack([means_per_read(inputs.groups, x["clean_correct"]) for x in found], axis=1)
        has = _has_positions(inputs) if name == "position_role" else True
        recovered = np.where(has, recovery(found), np.nan)
        dataset[f"recovery_by_{short}"] = (("statistic", "metric", *dims, name), recovered, RECOVERY)
        accuracy = np.where(has, accuracy, np.nan)
        dataset[f"clean_answer_accuracy_by_{short}"] = (("statistic", *dims, name), accuracy, ANSWER_ACCURACY)
        stacked = np.stack([of_metrics(x) for x in found], axis=1)
        dataset[f"metric_by_{short}"] = (("metric", "direction", "step", "pair", "place", name), stacked, PAIR_METRIC)
    put_runs(dataset, inputs, by_direction[DENOISING], clean="source", corrupted="base")
    controls = max(
        float(np.nanmax(np.abs(a["logit_difference_before"] - a["logit_difference_base"][..., None])))
        for a in by_direction
    )
    summary = summarise(dataset, inputs.metric)
    return Outcome(dataset, summary | {"controls": {"largest_effect_before_the_change_in_logits": controls}})


def summarise(dataset: xr.Dataset, metric: str) -> dict[str, Any]:
    """Summarises the recoveries of a metric: by component, and which positions hold most at each stage."""
    is_component = dataset["is_component"].values
    components, stages = (dataset["place"].values[which].tolist() for which in (is_component, ~is_component))
    summary = baselines(dataset, metric)
    held = dataset["recovery_by_role"].sel(metric=metric, place=stages, position_role=list(ROLES[:-2]))
    effects = {
        "by_component": component_table(dataset, components, metric),
        "components": largest_recoveries(dataset, "by_role", {"place": components, "position_role": "all"}, metric),
        "stages": [row | beside_recovery(summary, row["pair_kind"], row["step"]) for row in _holders(held)],
    }
    return summary | {"effects": effects}


def summary_lines(document: Mapping[str, Any]) -> list[str]:
    """Writes both runs, recovery by component and step, and which positions hold most at each stage."""
    effects, steps = document["effects"], shown_steps(document)
    return [
        *run_lines(document, steps),
        f"recovery of {document['metric'].replace('_', ' ')} when one component is taken from the clean run "
        "(1 everything, 0 nothing):",
        *component_lines(document, effects["by_component"], steps),
        f"stage by stage at step {center_step(document)}, from which positions most is recovered:",
        *_holder_lines(document, effects["stages"]),
    ]


def _holder_lines(document: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for kind in document["pairs"]["counts"]:
        own = [e for e in stages if (e["pair_kind"], e["step"]) == (kind, center_step(document))]
        own = [e for e in own if e["direction"] == "denoising"]
        held: dict[str, list[str]] = {}
        for e in own:
            stage = e["place"].replace("layer_", "L").replace("_post_", ".post_")
            held.setdefault(e["position_role"], []).append(f"{stage} {cell(e['recovery']['estimate'], '.2f')}")
        shown = "; ".join(f"{role}: {', '.join(parts)}" for role, parts in held.items())
        fails = failure(document, kind, center_step(document))
        lines.append(f"{kind:<6} {f'FAILS: {fails}' if fails else shown}")
    return lines


def split_positions(values_CxNxXxK: np.ndarray, roles: int) -> tuple[np.ndarray, np.ndarray]:
    """Separates patches of single positions, [C, N, X, W], from those of roles and of all, [C, N, X, roles].

    A pair's window is as long as its bucket's; rows of shorter ones end in NaN.
    """
    finite = np.isfinite(values_CxNxXxK).sum(axis=-1)[0, :, 0]  # of each pair: window and roles
    longest = values_CxNxXxK.shape[-1] - roles
    single = np.full((*values_CxNxXxK.shape[:-1], longest), np.nan, np.float32)
    masked = np.empty((*values_CxNxXxK.shape[:-1], roles), np.float32)
    for size in np.unique(finite):
        own = finite == size
        single[:, own, :, : size - roles] = values_CxNxXxK[:, own, :, : size - roles]
        masked[:, own] = values_CxNxXxK[:, own, :, size - roles : size]
    return single, masked


def _has_positions(inputs: InterventionInputs) -> np.ndarray:
    """Says whether any pair of a kind has positions of each of `ROLES`, [kinds, 1, 1, roles]."""
    roles = inputs.encoded.roles
    has = [
        [name == "all" or bool((roles[own] == PAIR_ROLES.index(name)).any()) for name in ROLES]
        for own in inputs.groups.members.values()
    ]
    return np.array(has)[:, None, None, :]


def _at_positions(
    inputs: InterventionInputs, single_CxNxXxW: np.ndarray, base_CxN: np.ndarray, length: int
) -> np.ndarray:
    """Orders values by position in the stream; those that no change can reach are the base run's."""
    found = np.broadcast_to(base_CxN[:, :, None, None], (*single_CxNxXxW.shape[:3], length)).copy()
    for n, first in enumerate(inputs.encoded.first_changed):
        span = int(inputs.encoded.last_affected[n]) - int(first) + 1
        found[:, n, :, first : first + span] = single_CxNxXxW[:, n, :, :span]
    return found


def _holders(recovery: xr.DataArray) -> list[dict[str, Any]]:
    """Finds, for each stage, the role of the positions that hold most of the change."""
    rows = []
    ordered = recovery.transpose("direction", "pair_kind", "step", "place", "statistic", "position_role")
    for at in np.ndindex(*ordered.shape[:4]):
        here = ordered.values[at]
        if np.isfinite(here[0]).any():
            role = int(np.nanargmax(here[0]))
            labels = {dim: ordered[dim].values[i] for dim, i in zip(ordered.dims, at, strict=False)}
            row = {dim: int(label) if dim == "step" else str(label) for dim, label in labels.items()}
            row["position_role"] = str(ordered["position_role"].values[role])
            rows.append(row | {"recovery": numbers(here[:, role])})
    return rows


KIND = Kind("activation_patching", analyse, summary_lines, summarise=summarise)
