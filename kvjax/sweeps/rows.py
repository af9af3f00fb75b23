"""The rows people read, drawn from a sweep's labelled means: one per checkpoint, head and MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from kvjax.artifacts.tables import SCHEMA_VERSION
from kvjax.config.benchmark import HELDOUT_SPLIT
from kvjax.config.run import BirthThresholds, Stabilization
from kvjax.measure.between_checkpoints import (
    change_from_previous,
    places,
    rank_correlation_to_previous,
    ranking,
    stays_stable,
    turnover_from_previous,
)
from kvjax.measure.heads import ATTENTION_MEASURES
from kvjax.sweeps.probe_index import ALL_SPLITS

TOP_COMPONENTS = 8  # how many a row names; the component tables hold all
BIRTH_SPLIT = "validation_iid"  # the split the thresholds were written for

SPLIT_METRICS = ("answer_accuracy", "answer_margin", "q", "r", "key_selectivity", "recency_selectivity")
DELTAS = (
    "answer_accuracy",
    "answer_margin",
    "answer_entropy",
    "answer_confidence",
    "loss",
    "q",
    "r",
    "key_selectivity",
    "recency_selectivity",
)

# Field of the row -> the probe it shows: target, and position (p_e or s_e).
_PROBE_CELLS = {
    "probe_query_key": ("query_key", "prediction"),
    "probe_query_key_at_support": ("query_key", "support"),
    "probe_support_value": ("value", "support"),
    "probe_answer_value": ("value", "prediction"),
    "probe_stale_value": ("stale_value", "prediction"),
    "probe_stale_value_at_support": ("stale_value", "support"),
}

_ABLATION_DROPS = ["head_accuracy_drop", "head_margin_drop", "mlp_accuracy_drop", "mlp_margin_drop"]
_DROP_COLUMNS = ("accuracy_drop", "accuracy_drop_mean", "accuracy_drop_resample")
_SIGN_FLOOR = 0.01  # an accuracy change below this has no sign worth comparing
_RANK_GAP = 3

Row = dict[str, Any]


def checkpoint_rows(
    dataset: xr.Dataset,
    *,
    run_name: str,
    seed: int,
    thresholds: BirthThresholds,
    stabilization: Stabilization | None,
) -> list[Row]:
    """Returns one row per checkpoint, in step order, ready for `CheckpointRow`.

    Args:
      dataset: the sweep's means.
      run_name, seed: of the run.
      thresholds: of births.
      stabilization: limits of stability; None while the run is incomplete, when nothing can be said to last.
    """
    whole = dataset.sel(split=ALL_SPLITS)
    steps = dataset["step"].values.tolist()
    splits = [split for split in dataset["split"].values.tolist() if split != ALL_SPLITS]
    series = {name: whole[name].values for name in DELTAS}
    series["w"] = series["answer_margin"]
    series["heldout_answer_accuracy"] = (
        dataset["answer_accuracy"].sel(split=HELDOUT_SPLIT).values
        if HELDOUT_SPLIT in splits
        else np.full(len(steps), np.nan)
    )
    deltas = {f"delta_{name}": change_from_previous(values) for name, values in series.items()}
    zero = whole[_ABLATION_DROPS].sel(ablation="zero")
    head_drops, mlp_drops = zero["head_accuracy_drop"].values, zero["mlp_accuracy_drop"].values  # [C, L, H], [C, L]
    flat_heads = head_drops.reshape(len(head_drops), -1)
    rank_correlations = rank_correlation_to_previous(flat_heads)
    numbers = {
        **series,
        **deltas,
        "token_accuracy": whole["token_accuracy"].values,
        "head_rank_correlation_prev": rank_correlations,
        "mlp_rank_correlation_prev": rank_correlation_to_previous(mlp_drops),
        "head_turnover": turnover_from_previous(flat_heads, max(1, flat_heads.shape[1] // 4)),
        "mlp_turnover": turnover_from_previous(mlp_drops, 1),
    }
    drifts = whole[["residual_drift", "residual_drift_to_reference"]].sel(position_role="prediction")
    split_metrics = _split_metrics(dataset, splits)
    # Every field as a list over checkpoints: labelled selection by checkpoint would take most of the time.
    columns = {
        "schema_version": [SCHEMA_VERSION] * len(steps),
        "run_name": [run_name] * len(steps),
        "seed": [seed] * len(steps),
        "step": steps,
        **{name: [_number(value) for value in values] for name, values in numbers.items()},
        "split_accuracy": [{s: of[s]["answer_accuracy"] for s in splits} for of in split_metrics],
        "split_metrics": split_metrics,
        **_slices(dataset),
        "difficulty_accuracy": _labelled(dataset["difficulty_accuracy"]),
        "answer_margin_summary": _labelled(whole["answer_margin_summary"]),
        "token_role_accuracy": _labelled(whole["token_role_accuracy"]),
        "birth_flags": _birth_flags(dataset, thresholds),
        "stabilized": _stabilized(whole, rank_correlations, stabilization),
        "lens_answer_accuracy_by_layer": _labelled(whole["lens_answer_accuracy"]),
        "lens_query_key_accuracy_by_layer": _labelled(whole["lens_query_key_accuracy"]),
        "lens_support_value_accuracy_by_layer": _labelled(whole["lens_support_value_accuracy"]),
        "answer_margin_by_layer": _labelled(whole["lens_answer_margin"]),
        **_probes(whole),
        "residual_drift_by_layer": _labelled(drifts["residual_drift"]),
        "residual_drift_to_reference_by_layer": _labelled(drifts["residual_drift_to_reference"]),
        "top_heads_by_ablation": _top(
            ("layer", "head"), zero["head_accuracy_drop"], margin_drop=zero["head_margin_drop"]
        ),
        "top_heads_by_localization": _top(
            ("layer", "head"), whole["head_support_attention"], query_attention_mean=whole["head_query_attention"]
        ),
        "top_mlps_by_ablation": _top(("layer",), zero["mlp_accuracy_drop"], margin_drop=zero["mlp_margin_drop"]),
        "mlp_write_norm_by_layer": _write_norms(whole["mlp_write_norm"]),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def head_rows(dataset: xr.Dataset) -> list[Row]:
    """Returns one row per checkpoint and head, ready for `HeadRow`; ranks are by accuracy drop, from 1."""
    whole = dataset.sel(split=ALL_SPLITS)
    attention = {
        name if name == "attention_entropy" else f"{name}_mean": whole[f"head_{name}"] for name in ATTENTION_MEASURES
    }
    return _component_rows(dataset["step"].values, ("layer", "head"), attention | _effects(whole, "head"))


def mlp_rows(dataset: xr.Dataset) -> list[Row]:
    """Returns one row per checkpoint and MLP, ready for `MlpRow`; ranks are by accuracy drop, from 1."""
    whole = dataset.sel(split=ALL_SPLITS)
    columns = {
        "write_norm_mean": whole["mlp_write_norm"].sel(position_role="prediction"),
        "write_norm_support_mean": whole["mlp_write_norm"].sel(position_role="support"),
        "answer_margin_delta_mean": whole["mlp_answer_margin_delta"],
    }
    return _component_rows(dataset["step"].values, ("layer",), _effects(whole, "mlp") | columns)


def _effects(whole: xr.Dataset, kind: str) -> dict[str, xr.DataArray | None]:
    """Returns what ablating the heads or MLPs costs, by every kind of ablation, and what they write to the answer.

    A kind that was not measured is None.
    """
    drops: dict[str, xr.DataArray | None] = {}
    for ablation, suffix in (("zero", ""), ("mean", "_mean"), ("resample", "_resample")):
        for measure in ("accuracy_drop", "margin_drop"):
            found = ablation in whole["ablation"].values
            drops[measure + suffix] = whole[f"{kind}_{measure}"].sel(ablation=ablation) if found else None
    return {
        **drops,
        "direct_logit_attribution": whole[f"{kind}_direct_logit_attribution"],
        "delta_accuracy_drop": whole[f"{kind}_accuracy_drop_change"].sel(ablation="zero"),
    }


def _component_rows(steps: np.ndarray, axes: tuple[str, ...], columns: Mapping[str, xr.DataArray | None]) -> list[Row]:
    """Returns one row per step and component from columns with dimensions (step, *axes)."""
    values = {
        name: None if column is None else column.transpose("step", *axes).values for name, column in columns.items()
    }
    rows = []
    for c, step in enumerate(steps.tolist()):
        drops = {name: values[name][c] for name in _DROP_COLUMNS if values[name] is not None}
        ranks = {name: places(drop) for name, drop in drops.items()}
        for index in np.ndindex(*values["accuracy_drop"].shape[1:]):
            numbers = {name: None if x is None else _number(x[(c, *index)]) for name, x in values.items()}
            told = [drop[index] for drop in drops.values()], [rank[index] for rank in ranks.values()]
            rows.append(
                {
                    "step": step,
                    **dict(zip(axes, index, strict=True)),
                    **numbers,
                    "ablations_disagree": _disagree(*told) if len(drops) > 1 else None,
                    "rank": int(ranks["accuracy_drop"][index]),
                }
            )
    return rows


def _disagree(drops: Sequence[float], ranks: Sequence[int]) -> bool:
    """Returns whether the kinds of ablation tell different stories of a component.

    They do where one kind says it helps and another that it hurts, each by at least `_SIGN_FLOOR`, or where its ranks
    differ by `_RANK_GAP` or more while some drop is that large.
    """
    signs = {np.sign(drop) for drop in drops if abs(drop) >= _SIGN_FLOOR}
    matters = max(abs(drop) for drop in drops) >= _SIGN_FLOOR
    return bool(len(signs) > 1 or (matters and max(ranks) - min(ranks) >= _RANK_GAP))


def _probes(whole: xr.Dataset) -> dict[str, list[dict[str, float | None]]]:
    """Returns the trained probes' cells that a row shows, each with its null."""
    stages = list(map(str, whole["stage"].values))

    def cells(variable: str, **where: str) -> list[dict[str, float | None]]:
        if variable not in whole:
            return [dict.fromkeys(stages) for _ in range(whole.sizes["step"])]
        return _labelled(whole[variable].sel(where))

    fields: dict[str, list[dict[str, float | None]]] = {}
    for name, (target, position) in _PROBE_CELLS.items():
        for variable, suffix in (("probe_accuracy", ""), ("probe_null", "_null")):
            fields[f"{name}{suffix}_by_layer"] = cells(variable, target=target, position_role=position)
    for variable in ("probe_current_vs_stale", "probe_current_vs_stale_null"):
        fields[f"{variable}_by_layer"] = cells(variable)
    return fields


def _number(value: Any) -> float | None:
    """Returns a Python number, or None where the value does not exist."""
    value = float(value)
    return value if np.isfinite(value) else None


def _labelled(values: xr.DataArray) -> list[dict[str, float | None]]:
    """Returns, for each checkpoint, the values along the one other dimension by its labels."""
    (dim,) = (dim for dim in values.dims if dim != "step")
    labels = list(map(str, values[dim].values))
    return [dict(zip(labels, map(_number, at_step), strict=True)) for at_step in values.transpose("step", dim).values]


def _split_metrics(dataset: xr.Dataset, splits: Sequence[str]) -> list[dict[str, dict[str, float | None]]]:
    by_metric = {name: _labelled(dataset[name]) for name in SPLIT_METRICS}
    by_metric["w"] = by_metric["answer_margin"]
    return [
        {split: {name: values[c][split] for name, values in by_metric.items()} for split in splits}
        for c in range(dataset.sizes["step"])
    ]


def _slices(dataset: xr.Dataset) -> dict[str, list[dict[str, dict[str, Any]]]]:
    """Returns accuracies and counts by axis and level; a label reads `axis=level`."""
    counts: dict[str, dict[str, Any]] = {}
    for label, number in zip(dataset["axis_value"].values, dataset["slice_count"].values, strict=True):
        axis, _, level = str(label).partition("=")
        counts.setdefault(axis, {})[level] = int(number)
    accuracies = [
        {axis: {level: at_step[f"{axis}={level}"] for level in levels} for axis, levels in counts.items()}
        for at_step in _labelled(dataset["slice_accuracy"])
    ]
    return {
        "slice_accuracy": accuracies,
        "slice_count": [{axis: dict(levels) for axis, levels in counts.items()} for _ in accuracies],
    }


def _birth_flags(dataset: xr.Dataset, thresholds: BirthThresholds) -> list[dict[str, bool | None]]:
    if BIRTH_SPLIT not in dataset["split"].values:
        return [dict.fromkeys(BirthThresholds.model_fields) for _ in range(dataset.sizes["step"])]
    sources = {"answer_accuracy": "answer_accuracy", "q": "q", "r": "r", "w": "answer_margin"}
    reached = {
        name: dataset[source].sel(split=BIRTH_SPLIT).values >= getattr(thresholds, name)
        for name, source in sources.items()
    }
    return [{name: bool(of[c]) for name, of in reached.items()} for c in range(dataset.sizes["step"])]


def _write_norms(norms: xr.DataArray) -> list[dict[str, dict[str, float | None]]]:
    """Returns, for each checkpoint, layer and position, the norm of what the MLP writes."""
    by_layer = {str(layer): _labelled(norms.sel(layer=layer)) for layer in norms["layer"].values.tolist()}
    return [{layer: of[c] for layer, of in by_layer.items()} for c in range(norms.sizes["step"])]


def _stabilized(
    whole: xr.Dataset, rank_correlations_C: np.ndarray, limits: Stabilization | None
) -> list[dict[str, bool | None]]:
    """Returns, for each checkpoint, whether the run stays stable from it on, by family; None while it is incomplete."""
    if limits is None:
        return [{"residual": None, "heads": None} for _ in range(whole.sizes["step"])]
    drift = whole["residual_drift"].sel(position_role="prediction").values  # [C, S]
    thousands = np.diff(whole["step"].values, prepend=np.nan) / 1000
    with np.errstate(invalid="ignore"):
        slow = (drift / thousands[:, None] <= limits.residual_drift).all(axis=1)
        ordered = rank_correlations_C >= limits.head_rank_correlation
    families = {"residual": stays_stable(slow), "heads": stays_stable(ordered)}
    return [{family: bool(of[c]) for family, of in families.items()} for c in range(len(slow))]


def _top(axes: tuple[str, ...], by: xr.DataArray, **beside: xr.DataArray) -> list[list[Row]]:
    """Returns, for each checkpoint, the components with the largest values: {layer, head?, value, …}, ties by index."""
    shown = {"value": by.values} | {name: column.values for name, column in beside.items()}

    def at_step(c: int) -> list[Row]:
        order = ranking(by.values[c].ravel())[:TOP_COMPONENTS].tolist()
        indices = [tuple(map(int, np.unravel_index(component, by.shape[1:]))) for component in order]
        return [
            dict(zip(axes, index, strict=True)) | {name: _number(values[(c, *index)]) for name, values in shown.items()}
            for index in indices
        ]

    return [at_step(c) for c in range(len(by))]
