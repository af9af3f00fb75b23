"""The rows people read, drawn from a sweep's labelled means: one per checkpoint, head and MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from kvjax.artifacts.tables import SCHEMA_VERSION
from kvjax.config import HELDOUT_SPLIT, BirthThresholds
from kvjax.measure.heads import ATTENTION_MEASURES
from kvjax.sweep.dataset import ALL_SPLITS
from kvjax.sweep.dynamics import (
    change_from_previous,
    rank_correlation_to_previous,
    ranking,
    turnover_from_previous,
)

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

Row = dict[str, Any]


def checkpoint_rows(dataset: xr.Dataset, *, run_name: str, seed: int, thresholds: BirthThresholds) -> list[Row]:
    """Returns one row per checkpoint, in step order, ready for `CheckpointRow`."""
    whole = dataset.sel(split=ALL_SPLITS)
    splits = [split for split in dataset["split"].values.tolist() if split != ALL_SPLITS]
    series = {name: whole[name].values for name in DELTAS}
    series["w"] = series["answer_margin"]
    series["heldout_answer_accuracy"] = (
        dataset["answer_accuracy"].sel(split=HELDOUT_SPLIT).values
        if HELDOUT_SPLIT in splits
        else np.full(dataset.sizes["step"], np.nan)
    )
    deltas = {f"delta_{name}": change_from_previous(values) for name, values in series.items()}
    head_drops = whole["head_accuracy_drop"].sel(ablation="zero").values  # [C, L, H]
    flat_heads = head_drops.reshape(len(head_drops), -1)
    mlp_drops = whole["mlp_accuracy_drop"].sel(ablation="zero").values  # [C, L]
    per_step = {
        **series,
        **deltas,
        "head_rank_correlation_prev": rank_correlation_to_previous(flat_heads),
        "mlp_rank_correlation_prev": rank_correlation_to_previous(mlp_drops),
        "head_turnover": turnover_from_previous(flat_heads, max(1, flat_heads.shape[1] // 4)),
        "mlp_turnover": turnover_from_previous(mlp_drops, 1),
    }
    rows = []
    for c, step in enumerate(dataset["step"].values.tolist()):
        now, here = dataset.isel(step=c), whole.isel(step=c)
        prediction = here.sel(position_role="prediction")
        zero, norms = here.sel(ablation="zero"), here["mlp_write_norm"]
        rows.append(
            {
                "schema_version": SCHEMA_VERSION,
                "run_name": run_name,
                "seed": seed,
                "step": step,
                **{name: _number(values[c]) for name, values in per_step.items()},
                "token_accuracy": _number(here["token_accuracy"]),
                "split_accuracy": {s: _number(now["answer_accuracy"].sel(split=s)) for s in splits},
                "split_metrics": {s: _split_metrics(now.sel(split=s)) for s in splits},
                **_slices(now),
                "difficulty_accuracy": _labelled(now["difficulty_accuracy"]),
                "answer_margin_summary": _labelled(here["answer_margin_summary"]),
                "token_role_accuracy": _labelled(here["token_role_accuracy"]),
                "birth_flags": _birth_flags(now, thresholds),
                "lens_answer_accuracy_by_layer": _labelled(here["lens_answer_accuracy"]),
                "lens_query_key_accuracy_by_layer": _labelled(here["lens_query_key_accuracy"]),
                "lens_support_value_accuracy_by_layer": _labelled(here["lens_support_value_accuracy"]),
                "answer_margin_by_layer": _labelled(here["lens_answer_margin"]),
                "residual_drift_by_layer": _labelled(prediction["residual_drift"]),
                "residual_drift_to_reference_by_layer": _labelled(prediction["residual_drift_to_reference"]),
                "top_heads_by_ablation": _top(
                    ("layer", "head"), zero["head_accuracy_drop"], margin_drop=zero["head_margin_drop"]
                ),
                "top_heads_by_localization": _top(
                    ("layer", "head"),
                    here["head_support_attention"],
                    query_attention_mean=here["head_query_attention"],
                ),
                "top_mlps_by_ablation": _top(
                    ("layer",), zero["mlp_accuracy_drop"], margin_drop=zero["mlp_margin_drop"]
                ),
                "mlp_write_norm_by_layer": {
                    str(layer): _labelled(norms.sel(layer=layer)) for layer in norms["layer"].values.tolist()
                },
            }
        )
    return rows


def head_rows(dataset: xr.Dataset) -> list[Row]:
    """Returns one row per checkpoint and head, ready for `HeadRow`; ranks are by accuracy drop, from 1."""
    whole = dataset.sel(split=ALL_SPLITS, ablation="zero")
    attention = {
        name if name == "attention_entropy" else f"{name}_mean": whole[f"head_{name}"] for name in ATTENTION_MEASURES
    }
    drops = {
        "accuracy_drop": whole["head_accuracy_drop"],
        "margin_drop": whole["head_margin_drop"],
        "delta_accuracy_drop": whole["head_accuracy_drop_change"],
    }
    return _component_rows(dataset["step"].values, ("layer", "head"), attention | drops)


def mlp_rows(dataset: xr.Dataset) -> list[Row]:
    """Returns one row per checkpoint and MLP, ready for `MlpRow`; ranks are by accuracy drop, from 1."""
    whole = dataset.sel(split=ALL_SPLITS, ablation="zero")
    columns = {
        "accuracy_drop": whole["mlp_accuracy_drop"],
        "margin_drop": whole["mlp_margin_drop"],
        "write_norm_mean": whole["mlp_write_norm"].sel(position_role="prediction"),
        "write_norm_support_mean": whole["mlp_write_norm"].sel(position_role="support"),
        "answer_margin_delta_mean": whole["mlp_answer_margin_delta"],
        "delta_accuracy_drop": whole["mlp_accuracy_drop_change"],
    }
    return _component_rows(dataset["step"].values, ("layer",), columns)


def _component_rows(steps: np.ndarray, axes: tuple[str, ...], columns: Mapping[str, xr.DataArray]) -> list[Row]:
    """Returns one row per step and component from columns with dimensions (step, *axes)."""
    values = {name: column.transpose("step", *axes).values for name, column in columns.items()}
    rows = []
    for c, step in enumerate(steps.tolist()):
        order = ranking(values["accuracy_drop"][c].ravel()).tolist()
        rank_of = {component: rank for rank, component in enumerate(order, start=1)}
        for component, index in enumerate(np.ndindex(*values["accuracy_drop"].shape[1:])):
            numbers = {name: _number(column[(c, *index)]) for name, column in values.items()}
            rows.append({"step": step, **dict(zip(axes, index, strict=True)), **numbers, "rank": rank_of[component]})
    return rows


def _number(value: Any) -> float | None:
    """Returns a Python number, or None where the value does not exist."""
    value = float(value)
    return value if np.isfinite(value) else None


def _labelled(values: xr.DataArray) -> dict[str, float | None]:
    (dim,) = values.dims
    return {str(label): _number(value) for label, value in zip(values[dim].values, values.values, strict=True)}


def _split_metrics(now: xr.Dataset) -> dict[str, float | None]:
    metrics = {name: _number(now[name]) for name in SPLIT_METRICS}
    return {**metrics, "w": metrics["answer_margin"]}


def _slices(now: xr.Dataset) -> dict[str, dict[str, dict[str, Any]]]:
    accuracy: dict[str, dict[str, Any]] = {}
    count: dict[str, dict[str, Any]] = {}
    for label, value, number in zip(
        now["axis_value"].values, now["slice_accuracy"].values, now["slice_count"].values, strict=True
    ):
        axis, _, level = str(label).partition("=")
        accuracy.setdefault(axis, {})[level] = _number(value)
        count.setdefault(axis, {})[level] = int(number)
    return {"slice_accuracy": accuracy, "slice_count": count}


def _birth_flags(now: xr.Dataset, thresholds: BirthThresholds) -> Mapping[str, bool | None]:
    if BIRTH_SPLIT not in now["split"].values:
        return dict.fromkeys(BirthThresholds.model_fields)
    there = now.sel(split=BIRTH_SPLIT)
    values = {"answer_accuracy": "answer_accuracy", "q": "q", "r": "r", "w": "answer_margin"}
    return {name: bool(there[source] >= getattr(thresholds, name)) for name, source in values.items()}


def _top(axes: tuple[str, ...], by: xr.DataArray, **beside: xr.DataArray) -> list[Row]:
    """Returns the components with the largest values, as {layer, head?, value, …}, ties by index."""
    values = by.values
    order = ranking(values.ravel())[:TOP_COMPONENTS].tolist()
    rows = []
    for component in order:
        index = tuple(int(i) for i in np.unravel_index(component, values.shape))
        others = {name: _number(column.values[index]) for name, column in beside.items()}
        rows.append({**dict(zip(axes, index, strict=True)), "value": _number(values[index]), **others})
    return rows
