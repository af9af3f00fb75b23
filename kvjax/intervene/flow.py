"""Activation patching, path patching and attribution patching of a window, as labelled arrays and a summary."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from kvjax.intervene.attribution_patching import METHODS, attribution_scores
from kvjax.intervene.inputs import ANSWER_ACCURACY, Outcome, Study, number, numbers
from kvjax.intervene.pair_runs import DENOISING, DIRECTIONS, both_directions, measuring
from kvjax.intervene.patching import Place, component_places, patching_effects, stage_places
from kvjax.intervene.paths import all_edges, all_senders, path_effects
from kvjax.intervene.recovery import means_per_read, recoveries
from kvjax.measure.statistics import spearman
from kvjax.task.corruption import PAIR_ROLES

TOP = 12  # effects a summary names

ROLES = (*PAIR_ROLES[1:], "all", PAIR_ROLES[0])

_RECOVERY = {"long_name": "(patched - base) / (source - base) of the metric", "units": "1"}
_METRIC = {"long_name": "logit(clean answer) - logit(corrupted answer), summed over a pair's reads", "units": "logits"}


def activation_patching(study: Study) -> Outcome:
    """Returns every stage, head and MLP patched at every position and role, in both directions."""
    stages, components = (
        stage_places(study.config.n_layers),
        component_places(study.config.n_layers, study.config.n_heads),
    )
    places = stages | components
    length = study.encoded.clean_tokens.shape[1]
    by_direction = _patched(study, tuple(places.values()))
    dataset = study.dataset(
        direction=DIRECTIONS, place=places, position_role=ROLES, position=range(length), pair=study.pair_ids
    )
    by_role, by_position = [], []
    for arrays in by_direction:
        role, position = {}, {}
        for name in ("difference", "clean_correct"):
            single, masked = _split(arrays[name], len(PAIR_ROLES))
            role[name] = np.concatenate([masked, arrays[f"{name}_before"][..., None]], axis=-1)
            position[name] = _at_positions(study, single, arrays[f"{name}_base"], length)
        by_role.append(role)
        by_position.append(position)

    def recovery(found: list[dict[str, np.ndarray]]) -> np.ndarray:
        pieces = zip(found, by_direction, strict=True)
        each = [
            recoveries(study.groups, x["difference"], a["difference_base"], a["difference_source"]) for x, a in pieces
        ]
        return np.stack(each, axis=1)

    dims = ("statistic", "direction", "pair_kind", "step", "place")
    for name, found in (("position_role", by_role), ("position", by_position)):
        short = name.removeprefix("position_")
        accuracy = np.stack([means_per_read(study.groups, x["clean_correct"]) for x in found], axis=1)
        has = _has_positions(study) if name == "position_role" else True
        dataset[f"recovery_by_{short}"] = ((*dims, name), np.where(has, recovery(found), np.nan), _RECOVERY)
        accuracy = np.where(has, accuracy, np.nan)
        dataset[f"clean_answer_accuracy_by_{short}"] = ((*dims, name), accuracy, ANSWER_ACCURACY)
    own = ("direction", "step", "pair", "place")
    for name, found in (("position_role", by_role), ("position", by_position)):
        stacked = np.stack([x["difference"] for x in found]).astype(np.float32)
        dataset[f"metric_by_{name.removeprefix('position_')}"] = ((*own, name), stacked, _METRIC)
    _put_runs(dataset, by_direction)
    controls = max(
        float(np.nanmax(np.abs(a["difference_before"] - a["difference_base"][..., None]))) for a in by_direction
    )
    effects = {
        "components": _top(dataset, "by_role", {"place": list(components), "position_role": "all"}),
        "stages": _holders(dataset["recovery_by_role"].sel(place=list(stages), position_role=list(ROLES[:-2]))),
    }
    return Outcome(
        dataset,
        {
            "baseline": {
                "clean": study.baseline(by_direction[0], "source"),
                "corrupted": study.baseline(by_direction[0], "base"),
            },
            "effects": effects,
            "controls": {"largest_effect_before_the_change_in_logits": controls},
        },
    )


def path_patching(study: Study) -> Outcome:
    """Returns every direct path patched, in both directions."""
    edges = all_edges(study.config.n_layers, study.config.n_heads)
    by_direction = _path_patched(study)
    names = [f"{edge.sender.name}->{edge.receiver.name}" for edge in edges]
    dataset = study.dataset(direction=DIRECTIONS, path=names, pair=study.pair_ids)
    dataset["sender"] = ("path", [edge.sender.name for edge in edges])
    dataset["receiver"] = ("path", [edge.receiver.name for edge in edges])
    found = np.stack(
        [recoveries(study.groups, a["difference"], a["difference_base"], a["difference_source"]) for a in by_direction],
        axis=1,
    )
    dataset["recovery"] = (("statistic", "direction", "pair_kind", "step", "path"), found, _RECOVERY)
    accuracy = np.stack([means_per_read(study.groups, a["clean_correct"]) for a in by_direction], axis=1)
    dataset["clean_answer_accuracy"] = (dataset["recovery"].dims, accuracy, ANSWER_ACCURACY)
    stacked = np.stack([a["difference"] for a in by_direction]).astype(np.float32)
    dataset["metric"] = (("direction", "step", "pair", "path"), stacked, _METRIC)
    _put_runs(dataset, by_direction)
    return Outcome(
        dataset,
        {
            "baseline": {
                "clean": study.baseline(by_direction[0], "source"),
                "corrupted": study.baseline(by_direction[0], "base"),
            },
            "effects": {"paths": _top(dataset, "", {})},
            "controls": {},
        },
    )


def attribution(study: Study) -> Outcome:
    """Returns first-order scores of every node and path beside the exact effects, denoising."""
    scores = study.pairs.run(measuring(_attribution, study.config), study.stacked)
    places = component_places(study.config.n_layers, study.config.n_heads)
    everything = tuple((stage_places(study.config.n_layers) | places).values())
    nodes, paths = _patched(study, everything)[DENOISING], _path_patched(study)[DENOISING]
    senders = all_senders(study.config.n_layers, study.config.n_heads)
    edges = all_edges(study.config.n_layers, study.config.n_heads)
    dataset = study.dataset(
        method=METHODS,
        node=[sender.name for sender in senders],
        path=[f"{edge.sender.name}->{edge.receiver.name}" for edge in edges],
        pair=study.pair_ids,
    )
    whole = _split(nodes["difference"], len(PAIR_ROLES))[1][..., -1]
    whole = whole[:, :, [0, *(everything.index(place) for place in places.values())]]  # the embedding, then components
    exact = {"nodes": whole - nodes["difference_base"][..., None]}
    exact["edges"] = paths["difference"] - paths["difference_base"][..., None]
    correlations: list[dict[str, Any]] = []
    for what, dim in (("nodes", "node"), ("edges", "path")):
        dims = ("statistic", "pair_kind", "step", dim)
        measured = means_per_read(study.groups, exact[what])
        meaning = "change of the metric when patched, mean over reads"
        dataset[f"{dim}_exact"] = (dims, measured, {"long_name": meaning, "units": "logits"})
        screened = np.stack([means_per_read(study.groups, scores[f"{what}/{m}"]) for m in METHODS], axis=1)
        meaning = "first-order estimate of that change, mean over reads"
        dataset[f"{dim}_score"] = (
            ("statistic", "method", *dims[1:]),
            screened,
            {"long_name": meaning, "units": "logits"},
        )
        dataset[f"{dim}_score_by_pair"] = (
            ("method", "step", "pair", dim),
            np.stack([scores[f"{what}/{m}"] for m in METHODS]).astype(np.float32),
            {"long_name": f"{meaning}, summed over a pair's reads", "units": "logits"},
        )
        for m, method in enumerate(METHODS):
            for k, kind in enumerate(study.groups.kinds):
                for c, step in enumerate(study.steps):
                    correlations.append(
                        {
                            "of": what,
                            "method": method,
                            "pair_kind": kind,
                            "step": step,
                            "rank_correlation": number(spearman(screened[0, m, k, c], measured[0, k, c])),
                        }
                    )
    return Outcome(dataset, {"baseline": {}, "effects": {"rank_correlation_with_exact": correlations}, "controls": {}})


def _patched(study: Study, places: tuple[Place, ...]) -> list[dict[str, np.ndarray]]:
    """Returns the patching of places, by direction; run once for all kinds that look at it."""

    def run() -> list[dict[str, np.ndarray]]:
        return _each_direction(study.pairs.run(measuring(_patching, study.config, places), study.stacked))

    return study.once(("patched", places), run)


def _path_patched(study: Study) -> list[dict[str, np.ndarray]]:
    """Returns the patching of every path, by direction; run once for all kinds that look at it."""
    return study.once("paths", lambda: _each_direction(study.pairs.run(measuring(_paths, study.config), study.stacked)))


def _patching(config, places, params, batch, extra, window):
    del extra

    def one(direction):
        return patching_effects(params, config, batch, window=window, direction=direction, places=places)

    return both_directions(one)


def _paths(config, params, batch, extra, window):
    del extra
    return both_directions(lambda d: path_effects(params, config, batch, window=window, direction=d))


def _attribution(config, params, batch, extra, window):
    del extra
    return attribution_scores(params, config, batch, window=window, direction=DENOISING)


def _has_positions(study: Study) -> np.ndarray:
    """Returns whether any pair of a kind has positions of each of `ROLES`: [kinds, 1, 1, roles]."""
    roles = study.encoded.roles
    has = [
        [name == "all" or bool((roles[own] == PAIR_ROLES.index(name)).any()) for name in ROLES]
        for own in study.groups.members.values()
    ]
    return np.array(has)[:, None, None, :]


def _each_direction(arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    return [{name: x[:, :, d] for name, x in arrays.items()} for d in range(len(DIRECTIONS))]


def _split(values_CxNxXxK: np.ndarray, roles: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns what was patched at single positions of the window, [C, N, X, W], and at roles and all, [C, N, X, roles].

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


def _at_positions(study: Study, single_CxNxXxW: np.ndarray, base_CxN: np.ndarray, length: int) -> np.ndarray:
    """Returns values by position in the stream; where nothing can have changed they are the base's."""
    found = np.broadcast_to(base_CxN[:, :, None, None], (*single_CxNxXxW.shape[:3], length)).copy()
    for n, first in enumerate(study.encoded.first_changed):
        span = int(study.encoded.last_affected[n]) - int(first) + 1
        found[:, n, :, first : first + span] = single_CxNxXxW[:, n, :, :span]
    return found


def _put_runs(dataset: xr.Dataset, by_direction: list[dict[str, np.ndarray]]) -> None:
    """The metric and accuracy of both runs without intervention, of every pair."""
    clean, corrupted = by_direction[0], by_direction[0]
    for run, arrays, suffix in (("clean", clean, "source"), ("corrupted", corrupted, "base")):
        dataset[f"metric_{run}"] = (("step", "pair"), arrays[f"difference_{suffix}"], _METRIC)
        dataset[f"clean_answers_{run}"] = (
            ("step", "pair"),
            arrays[f"clean_correct_{suffix}"],
            {"long_name": "affected reads whose argmax is the clean answer", "units": "events"},
        )


def _top(dataset: xr.Dataset, suffix: str, where: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the largest recoveries of each kind of pair, direction and step, with the accuracy beside each."""
    rows = []
    outer = ("direction", "pair_kind", "step")
    names = ("recovery", "clean_answer_accuracy")
    recovery, accuracy = (dataset[f"{name}_{suffix}" if suffix else name].sel(where) for name in names)
    inner = [dim for dim in recovery.dims if dim not in ("statistic", *outer)]
    recovery, accuracy = (x.transpose(*outer, "statistic", *inner) for x in (recovery, accuracy))
    for at in np.ndindex(*recovery.shape[: len(outer)]):
        here = recovery.values[at]
        flat, right = here.reshape(len(here), -1), accuracy.values[at].reshape(len(here), -1)
        order = np.argsort(-np.nan_to_num(flat[0], nan=-np.inf), kind="stable")
        for index in order[np.isfinite(flat[0, order])][:TOP]:
            place = (*at, *np.unravel_index(index, here.shape[1:]))
            labels = {dim: recovery[dim].values[i] for dim, i in zip((*outer, *inner), place, strict=True)}
            row = {dim: int(label) if dim == "step" else str(label) for dim, label in labels.items()}
            found = {"recovery": numbers(flat[:, index]), "clean_answer_accuracy": numbers(right[:, index])}
            rows.append(row | found)
    return rows


def _holders(recovery: xr.DataArray) -> list[dict[str, Any]]:
    """Returns, for each stage, the role of the positions that hold most of what was changed."""
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
