"""What the tables and summaries of patched runs share, whatever is patched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from kvjax.intervene.inputs import numbers
from kvjax.intervene.pair_runs import DIRECTIONS

TOP = 12  # effects a summary names

RECOVERY = {"long_name": "(patched - base) / (source - base) of the metric", "units": "1"}
PAIR_METRIC = {
    "long_name": "logit(clean answer) - logit(corrupted answer), summed over a pair's reads",
    "units": "logits",
}


def each_direction(arrays: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Splits arrays [C, N, direction, …] by `DIRECTIONS`."""
    return [{name: x[:, :, d] for name, x in arrays.items()} for d in range(len(DIRECTIONS))]


def put_runs(dataset: xr.Dataset, denoising: Mapping[str, np.ndarray]) -> None:
    """Adds the metric and the right answers of both runs without intervention, of every pair."""
    for run, suffix in (("clean", "source"), ("corrupted", "base")):
        dataset[f"metric_{run}"] = (("step", "pair"), denoising[f"difference_{suffix}"], PAIR_METRIC)
        dataset[f"clean_answers_{run}"] = (
            ("step", "pair"),
            denoising[f"clean_correct_{suffix}"],
            {"long_name": "affected reads whose argmax is the clean answer", "units": "events"},
        )


def largest_recoveries(dataset: xr.Dataset, suffix: str, where: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lists the largest recoveries of each kind of pair, direction and step, with the accuracy beside each."""
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
