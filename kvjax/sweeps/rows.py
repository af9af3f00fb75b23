"""The rows people read, drawn from a sweep's labelled means: one per checkpoint, head and MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from kvjax.artifacts.tables import SCHEMA_VERSION
from kvjax.config import HELDOUT_SPLIT, BirthThresholds, Stabilization
from kvjax.measure.heads import ATTENTION_MEASURES
from kvjax.sweeps.dynamics import (
    change_from_previous,
    places,
    rank_correlation_to_previous,
    ranking,
    stays_stable,
    turnover_from_previous,
)
from kvjax.sweeps.means import ALL_SPLITS

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
    # What rows show, alone: labelled selection takes time by the variable.
    dataset = dataset.drop_vars([name for name in dataset if str(name).endswith("_change")])
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
    stable = _stabilized(whole, per_step["head_rank_correlation_prev"], stabilization)
    rows = []
    for c, step in enumerate(dataset["step"].values.tolist()):
        now, here = dataset.isel(step=c), whole.isel(step=c)
        drifts = here[["residual_drift", "residual_drift_to_reference"]].sel(position_role="prediction")
        zero, norms = here[_ABLATION_DROPS].sel(ablation="zero"), here["mlp_write_norm"]
        rows.append(
            {
                "schema_version": SCHEMA_VERSION,
                "run_name": run_name,
                "seed": seed,
                "step": step,
                **{name: _number(values[c]) for name, values in per_step.items()},
                "token_accuracy": _number(here["token_accuracy"]),
                "split_accuracy": {s: _number(now["answer_accuracy"].sel(split=s)) for s in splits},
                "split_metrics": _split_metrics(now, splits),
                **_slices(now),
                "difficulty_accuracy": _labelled(now["difficulty_accuracy"]),
                "answer_margin_summary": _labelled(here["answer_margin_summary"]),
                "token_role_accuracy": _labelled(here["token_role_accuracy"]),
                "birth_flags": _birth_flags(now, thresholds),
                "stabilized": {family: None if x is None else bool(x[c]) for family, x in stable.items()},
                "lens_answer_accuracy_by_layer": _labelled(here["lens_answer_accuracy"]),
                "lens_query_key_accuracy_by_layer": _labelled(here["lens_query_key_accuracy"]),
                "lens_support_value_accuracy_by_layer": _labelled(here["lens_support_value_accuracy"]),
                "answer_margin_by_layer": _labelled(here["lens_answer_margin"]),
                **_probes(here),
                "residual_drift_by_layer": _labelled(drifts["residual_drift"]),
                "residual_drift_to_reference_by_layer": _labelled(drifts["residual_drift_to_reference"]),
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


def _probes(here: xr.Dataset) -> dict[str, dict[str, float | None]]:
    """Returns the trained probes' cells that a row shows, each with its null."""
    stages = [str(stage) for stage in here["stage"].values]
    fields: dict[str, dict[str, float | None]] = {}
    for name, (target, position) in _PROBE_CELLS.items():
        for variable, suffix in (("probe_accuracy", ""), ("probe_null", "_null")):
            fields[f"{name}{suffix}_by_layer"] = (
                _labelled(here[variable].sel(target=target, position_role=position))
                if variable in here
                else dict.fromkeys(stages)
            )
    for variable in ("probe_current_vs_stale", "probe_current_vs_stale_null"):
        fields[f"{variable}_by_layer"] = _labelled(here[variable]) if variable in here else dict.fromkeys(stages)
    return fields


def _number(value: Any) -> float | None:
    """Returns a Python number, or None where the value does not exist."""
    value = float(value)
    return value if np.isfinite(value) else None


def _labelled(values: xr.DataArray) -> dict[str, float | None]:
    (dim,) = values.dims
    return {str(label): _number(value) for label, value in zip(values[dim].values, values.values, strict=True)}


def _split_metrics(now: xr.Dataset, splits: Sequence[str]) -> dict[str, dict[str, float | None]]:
    by_metric = {name: _labelled(now[name]) for name in SPLIT_METRICS}
    by_metric["w"] = by_metric["answer_margin"]
    return {split: {name: values[split] for name, values in by_metric.items()} for split in splits}


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
    there = now[["answer_accuracy", "q", "r", "answer_margin"]].sel(split=BIRTH_SPLIT)
    values = {"answer_accuracy": "answer_accuracy", "q": "q", "r": "r", "w": "answer_margin"}
    return {name: bool(there[source] >= getattr(thresholds, name)) for name, source in values.items()}


def _stabilized(
    whole: xr.Dataset, rank_correlations_C: np.ndarray, limits: Stabilization | None
) -> dict[str, np.ndarray | None]:
    """Returns, by family, from which checkpoint on the run stays stable, bool [C]; None while it is incomplete."""
    if limits is None:
        return {"residual": None, "heads": None}
    drift = whole["residual_drift"].sel(position_role="prediction").values  # [C, S]
    thousands = np.diff(whole["step"].values, prepend=np.nan) / 1000
    with np.errstate(invalid="ignore"):
        slow = (drift / thousands[:, None] <= limits.residual_drift).all(axis=1)
        ordered = rank_correlations_C >= limits.head_rank_correlation
    return {"residual": stays_stable(slow), "heads": stays_stable(ordered)}


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
