"""Draws the rows people read from a sweep's labelled means: one per checkpoint, head and MLP."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from kvjax.artifacts.sweep_schema import TrajectoryBreak
from kvjax.artifacts.tables import SCHEMA_VERSION
from kvjax.config.run import BirthThresholds, Stabilization
from kvjax.measure.between_checkpoints import (
    change_from_previous,
    stays_stable,
)
from kvjax.measure.declaration import Measure, RowField, Table
from kvjax.measure.registry import ALL_SPLITS, BIRTH_SPLIT, drop_fields, row_fields, triggers
from kvjax.measure.statistics import places, ranking
from kvjax.sweeps.settings import REPLACEMENTS

_DROPS_OF: dict[Table, str] = {"heads": "head_accuracy_drop", "mlps": "mlp_accuracy_drop"}

TOP_COMPONENTS = 8  # how many a row names; the component tables hold all

_ABLATION_DROPS = ["head_accuracy_drop", "head_margin_drop", "mlp_accuracy_drop", "mlp_margin_drop"]
_DISAGREEMENT = 2.0  # the factor that the drops of two kinds differ by if they disagree

Row = dict[str, Any]


def checkpoint_rows(
    dataset: xr.Dataset,
    intervals: xr.Dataset,
    *,
    run_name: str,
    seed: int | None,
    thresholds: BirthThresholds,
    stabilized: Sequence[Mapping[str, bool | None]],
    provisional: bool = False,
    breaks: Sequence[TrajectoryBreak] = (),
) -> list[Row]:
    """Draws one row per checkpoint from the means, in step order.

    Args:
      dataset: the sweep's means; its attribute `ranked_by` names the kind of ablation that ranks components.
      intervals: of the means.
      run_name, seed: of the run.
      thresholds: of births.
      stabilized: for each checkpoint, see `stabilized_from`.
      provisional: whether the run has not reached its planned end, so that what lasts to its last checkpoint may not.
      breaks: checkpoints that cannot be neighbours in one training run.
    """
    whole = dataset.sel(split=ALL_SPLITS)
    steps = dataset["step"].values.tolist()
    splits = [split for split in dataset["split"].values.tolist() if split != ALL_SPLITS]
    ranked_by = dataset.attrs["ranked_by"]
    zero = whole[_ABLATION_DROPS].sel(ablation="zero")
    split_metrics = _split_metrics(dataset, splits)
    # Every field as a list over checkpoints: labelled selection by checkpoint would take most of the time.
    columns = {
        "schema_version": [SCHEMA_VERSION] * len(steps),
        "run_name": [run_name] * len(steps),
        "seed": [seed] * len(steps),
        "step": steps,
        "ranked_by": [ranked_by] * len(steps),
        **_declared_fields(dataset),
        "split_accuracy": [{s: of[s]["answer_accuracy"] for s in splits} for of in split_metrics],
        "split_metrics": split_metrics,
        **_slices(whole),
        "split_difficulty_accuracy": _by_split(dataset["difficulty_accuracy"], splits),
        "birth_flags": _birth_flags(dataset, thresholds),
        "stabilized": list(stabilized),
        "provisional": [provisional] * len(steps),
        "trajectory_breaks": [[found.reason for found in breaks if found.after == step] for step in steps],
        "top_heads": _leaders(dataset, intervals, "heads", ("layer", "head")),
        "top_mlps": _leaders(dataset, intervals, "mlps", ("layer",)),
        "top_heads_by_ablation": _top(
            ("layer", "head"), zero["head_accuracy_drop"], margin_drop=zero["head_margin_drop"]
        ),
        "top_heads_by_localization": _top(
            ("layer", "head"), whole["head_support_attention"], query_attention_mean=whole["head_query_attention"]
        ),
        "top_mlps_by_ablation": _top(("layer",), zero["mlp_accuracy_drop"], margin_drop=zero["mlp_margin_drop"]),
        "q_head": _largest_head(whole["head_query_attention"]),
        "r_head": _largest_head(whole["head_support_attention"]),
        "key_selectivity_head": _largest_head(
            whole["head_key_selectivity"],
            null=whole["head_key_selectivity_null"],
            recency_selectivity=whole["head_recency_selectivity"],
        ),
        "mlp_write_norm_by_layer": _write_norms(whole["mlp_write_norm"]),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def stable_checkpoints(dataset: xr.Dataset, limits: Stabilization) -> dict[str, np.ndarray]:
    """Checks, for each family, at which checkpoints a run changes no more than limits allow, bool [C]."""
    whole = dataset.sel(split=ALL_SPLITS)
    drift = whole["residual_drift"].sel(position_role="prediction").values  # [C, S]
    thousands = np.diff(whole["step"].values, prepend=np.nan) / 1000
    with np.errstate(invalid="ignore"):
        slow = (drift / thousands[:, None] <= limits.residual_drift).all(axis=1)
        ordered = whole["head_rank_correlation_prev"].values >= limits.head_rank_correlation
    return {"residual": slow, "heads": ordered}


def stabilized_from(stable: Mapping[str, np.ndarray]) -> list[dict[str, bool | None]]:
    """Tells, for each checkpoint and family, whether the run stays stable from it on.

    Args:
      stable: see `stable_checkpoints`, of all checkpoints of the run.
    """
    lasting = {family: stays_stable(of_family).tolist() for family, of_family in stable.items()}
    return [dict(zip(lasting, row, strict=True)) for row in zip(*lasting.values(), strict=True)]


def head_rows(dataset: xr.Dataset, intervals: xr.Dataset) -> list[Row]:
    """Draws one row per checkpoint and head, see `checkpoint_rows`; ranks are by accuracy drop, from 1."""
    return _component_rows(dataset, intervals, "heads", ("layer", "head"))


def mlp_rows(dataset: xr.Dataset, intervals: xr.Dataset) -> list[Row]:
    """Draws one row per checkpoint and MLP, see `checkpoint_rows`; ranks are by accuracy drop, from 1."""
    return _component_rows(dataset, intervals, "mlps", ("layer",))


def _selected(dataset: xr.Dataset, measure: Measure, field: RowField) -> xr.DataArray | None:
    """Selects what a field of a row shows, with a dimension `step`; None if it was not measured."""
    if measure.name not in dataset:
        return None
    values = dataset[measure.name]
    where = ({"split": ALL_SPLITS} if measure.by_split else {}) | dict(field.where)
    if any(label not in values[axis].values for axis, label in where.items()):
        return None
    return values.sel(where)


def _declared_fields(dataset: xr.Dataset) -> dict[str, list[Any]]:
    """Forms every field of a checkpoint's row that shows a measure, as a list over checkpoints."""
    fields: dict[str, list[Any]] = {}
    count = dataset.sizes["step"]
    for measure, field in row_fields("checkpoint"):
        values, axes = _selected(dataset, measure, field), measure.shape_in_row(field)
        if axes:
            labels = list(map(str, dataset[axes[0]].values))
            fields[field.name] = [dict.fromkeys(labels) for _ in range(count)] if values is None else _labelled(values)
            continue
        series = np.full(count, np.nan) if values is None else values.values
        fields[field.name] = [_number(value) for value in series]
        if field.delta:
            fields[f"delta_{field.name}"] = [_number(value) for value in change_from_previous(series)]
    return fields


def _component_rows(dataset: xr.Dataset, intervals: xr.Dataset, table: Table, axes: tuple[str, ...]) -> list[Row]:
    """Forms one row per step and component of a table, which has the dimensions (step, *axes)."""
    values: dict[str, np.ndarray | None] = {}
    for measure, field in row_fields(table):
        column = _selected(dataset, measure, field)
        values[field.name] = None if column is None else column.transpose("step", *axes).values
        if field.delta:
            values[f"delta_{field.name}"] = None if column is None else change_from_previous(values[field.name])
    ranked_by, ranking_drops = _ranking_drops(dataset, table)
    disagree = _disagreements(intervals, table)
    rows = []
    for c, step in enumerate(dataset["step"].values.tolist()):
        ranks = places(ranking_drops[c])
        for index in np.ndindex(*ranks.shape):
            numbers = {name: None if x is None else _number(x[(c, *index)]) for name, x in values.items()}
            rows.append(
                {
                    "step": step,
                    **dict(zip(axes, index, strict=True)),
                    **numbers,
                    "ablations_disagree": None if disagree is None else bool(disagree[(c, *index)]),
                    "rank": int(ranks[index]),
                    "ranked_by": ranked_by,
                }
            )
    return rows


def _leaders(dataset: xr.Dataset, intervals: xr.Dataset, table: Table, axes: tuple[str, ...]) -> list[list[Row]]:
    """Picks, for each checkpoint, the first components of the ranking, with their drops under every kind."""
    shown = {field.name: _selected(dataset, measure, field) for measure, field in drop_fields(table)}
    by_step: list[list[Row]] = []
    disagree = _disagreements(intervals, table)
    for c, drops in enumerate(_ranking_drops(dataset, table)[1]):
        leaders: list[Row] = []
        for component in ranking(drops.ravel())[:TOP_COMPONENTS].tolist():
            index = tuple(map(int, np.unravel_index(component, drops.shape)))
            numbers = {name: None if x is None else _number(x.values[(c, *index)]) for name, x in shown.items()}
            told_apart = None if disagree is None else bool(disagree[(c, *index)])
            leaders.append(dict(zip(axes, index, strict=True)) | numbers | {"ablations_disagree": told_apart})
        by_step.append(leaders)
    return by_step


def _ranking_drops(dataset: xr.Dataset, table: Table) -> tuple[str, np.ndarray]:
    """Selects the accuracy drops that rank a table's components, [C, L] or [C, L, H]; names their kind of ablation."""
    kind = dataset.attrs["ranked_by"]
    return kind, dataset[_DROPS_OF[table]].sel(split=ALL_SPLITS, ablation=kind).values


def _disagreements(intervals: xr.Dataset, table: Table) -> np.ndarray | None:
    """Checks on which components two kinds of ablation disagree, bool [C, L] or [C, L, H]; None if there is one kind.

    See docs/definitions.md, "Heads and MLPs". The random control replaces nothing, so it is no such kind.
    """
    drops = intervals[_DROPS_OF[table]].sel(split=ALL_SPLITS)
    kinds = [kind for kind in drops["ablation"].values.tolist() if kind in REPLACEMENTS]
    if len(kinds) < 2:
        return None
    by_kind = [drops.sel(ablation=kind).transpose("statistic", "step", ...) for kind in kinds]
    found = [
        disagreement(*(x.sel(statistic=s).values for x in pair for s in ("estimate", "low", "high")))
        for pair in itertools.combinations(by_kind, 2)
    ]
    return np.any(found, axis=0)


def disagreement(
    a: np.ndarray, low_a: np.ndarray, high_a: np.ndarray, b: np.ndarray, low_b: np.ndarray, high_b: np.ndarray
) -> np.ndarray:
    """Checks if two effects have disjoint intervals and differ by a factor of two.

    The larger is at least twice the smaller, by absolute value, or one is positive and the other negative. Any effect
    is more than twice 0. Nothing is claimed if an interval is missing.

    Returns:
      bool, of the arrays' shape.
    """
    disjoint = (low_a > high_b) | (low_b > high_a)
    small, large = np.minimum(abs(a), abs(b)), np.maximum(abs(a), abs(b))
    return disjoint & ((a * b < 0) | (large >= _DISAGREEMENT * small))


def _number(value: Any) -> float | None:
    """Makes a Python number, or None if the value does not exist."""
    value = float(value)
    return value if np.isfinite(value) else None


def _labelled(values: xr.DataArray) -> list[dict[str, float | None]]:
    """Maps, for each checkpoint, the labels of the one other dimension to the values."""
    (dim,) = (dim for dim in values.dims if dim != "step")
    labels = list(map(str, values[dim].values))
    return [dict(zip(labels, map(_number, at_step), strict=True)) for at_step in values.transpose("step", dim).values]


def _split_metrics(dataset: xr.Dataset, splits: Sequence[str]) -> list[dict[str, dict[str, float | None]]]:
    """Collects, for each checkpoint and split, the measures that are declared to be shown for every split."""
    by_metric = {
        field.name: _labelled(dataset[measure.name])
        for measure, field in row_fields("checkpoint")
        if measure.split_metric and not field.where
    }
    return [
        {split: {name: values[c][split] for name, values in by_metric.items()} for split in splits}
        for c in range(dataset.sizes["step"])
    ]


def _by_split(values: xr.DataArray, splits: Sequence[str]) -> list[dict[str, dict[str, float | None]]]:
    """Maps, for each checkpoint and split, the labels of the one other dimension to the values."""
    of_split = {split: _labelled(values.sel(split=split)) for split in splits}
    return [{split: of[c] for split, of in of_split.items()} for c in range(values.sizes["step"])]


def _slices(whole: xr.Dataset) -> dict[str, list[dict[str, dict[str, Any]]]]:
    """Groups accuracies and counts by axis and level; a label reads `axis=level`."""
    counts: dict[str, dict[str, Any]] = {}
    for label, number in zip(whole["axis_value"].values, whole["slice_count"].values, strict=True):
        axis, _, level = str(label).partition("=")
        counts.setdefault(axis, {})[level] = int(number)
    accuracies = [
        {axis: {level: at_step[f"{axis}={level}"] for level in levels} for axis, levels in counts.items()}
        for at_step in _labelled(whole["slice_accuracy"])
    ]
    return {
        "slice_accuracy": accuracies,
        "slice_count": [{axis: dict(levels) for axis, levels in counts.items()} for _ in accuracies],
    }


def _birth_flags(dataset: xr.Dataset, thresholds: BirthThresholds) -> list[dict[str, bool | None]]:
    reached: dict[str, np.ndarray] = {}
    of_kind = {field.trigger: (measure.name, field.where.get("split", BIRTH_SPLIT)) for measure, field in triggers()}
    for name, threshold in thresholds.model_dump().items():
        measure, split = of_kind[name]
        if threshold is not None and split in dataset["split"].values:
            reached[name] = dataset[measure].sel(split=split).values >= threshold
    return [
        {name: bool(reached[name][c]) if name in reached else None for name in BirthThresholds.model_fields}
        for c in range(dataset.sizes["step"])
    ]


def _write_norms(norms: xr.DataArray) -> list[dict[str, dict[str, float | None]]]:
    """Collects, for each checkpoint, layer and position, the norm of the MLP's output."""
    by_layer = {str(layer): _labelled(norms.sel(layer=layer)) for layer in norms["layer"].values.tolist()}
    return [{layer: of[c] for layer, of in by_layer.items()} for c in range(norms.sizes["step"])]


def _largest_head(by: xr.DataArray, **beside: xr.DataArray) -> list[Row | None]:
    """Picks, for each checkpoint, the head with the largest mean over reads; None if it is defined for no head.

    A maximum over heads of every read, as in `q`, `r` and `key_selectivity`, is biased upward; this one hardly is.
    """
    return [heads[0] if heads[0]["value"] is not None else None for heads in _top(("layer", "head"), by, **beside)]


def _top(axes: tuple[str, ...], by: xr.DataArray, **beside: xr.DataArray) -> list[list[Row]]:
    """Picks, for each checkpoint, the components with the largest values: {layer, head?, value, …}, ties by index."""
    shown = {"value": by.values} | {name: column.values for name, column in beside.items()}

    def at_step(c: int) -> list[Row]:
        order = ranking(by.values[c].ravel())[:TOP_COMPONENTS].tolist()
        indices = [tuple(map(int, np.unravel_index(component, by.shape[1:]))) for component in order]
        return [
            dict(zip(axes, index, strict=True)) | {name: _number(values[(c, *index)]) for name, values in shown.items()}
            for index in indices
        ]

    return [at_step(c) for c in range(len(by))]
