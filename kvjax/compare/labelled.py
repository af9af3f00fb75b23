"""Labels what a comparison found as xarray datasets, for the file and for Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

_FAMILIES = {"births": "birth", "half_rises": "half_rise", "stabilization": "stabilization"}
# Variable -> field of `EventEntry`.
_OF_EVENT = {
    "event_num_formed": "formed",
    "event_num_runs": "total",
    "event_median": "median",
    "event_median_low": "median_low",
    "event_median_high": "median_high",
}
_OF_PAIR = ("share", "low", "high", "before", "after", "undetermined")


def events_dataset(document: Mapping[str, Any]) -> xr.Dataset:
    """Labels when each run reached what: event [event, run], and its survival over runs, [event].

    `formed` is NaN for a run that lacks the metric; a censored run's step is its last checkpoint.
    """
    names = [run["name"] for run in document["runs"]]
    events = {f"{word}.{name}": entry for family, word in _FAMILIES.items() for name, entry in document[family].items()}
    step, formed = (np.full((len(events), len(names)), np.nan) for _ in range(2))
    for row, entry in enumerate(events.values()):
        for own in entry["runs"]:
            column = names.index(own["run"])
            step[row, column], formed[row, column] = own["step"], own["formed"]
    dims = ("event", "run")
    steps = {"units": "steps"}
    found = xr.Dataset(
        {
            "event_step": (dims, step, steps | {"long_name": "step at which it formed, else the last checkpoint"}),
            "event_formed": (dims, formed, {"units": "1", "long_name": "1 if it formed, 0 if the run is censored"}),
        },
        coords={"event": list(events), "run": names},
    )
    for name, field in _OF_EVENT.items():
        values = [np.nan if entry[field] is None else float(entry[field]) for entry in events.values()]
        found[name] = ("event", np.array(values), steps if "median" in name else {"units": "runs"})
    return found


def order_dataset(document: Mapping[str, Any]) -> xr.Dataset:
    """Labels in how many runs a metric moved before another, [first, second]; NaN on the diagonal."""
    pairs = document["order"]["pairs"]
    metrics = list(dict.fromkeys(name for pair in pairs for name in (pair["first"], pair["second"])))
    values = {name: np.full((len(metrics), len(metrics)), np.nan) for name in _OF_PAIR}
    for pair in pairs:
        i, j = metrics.index(pair["first"]), metrics.index(pair["second"])
        known = pair["share"] is not None
        turned = {
            "share": 1 - pair["share"] if known else np.nan,
            "low": 1 - pair["high"] if known else np.nan,
            "high": 1 - pair["low"] if known else np.nan,
            **{"before": pair["after"], "after": pair["before"], "undetermined": pair["undetermined"]},
        }
        for name in _OF_PAIR:
            values[name][i, j] = np.nan if pair[name] is None else pair[name]
            values[name][j, i] = turned[name]
    units = dict.fromkeys(("before", "after", "undetermined"), "runs")
    return xr.Dataset(
        {f"order_{name}": (("first", "second"), x, {"units": units.get(name, "1")}) for name, x in values.items()},
        coords={"first": metrics, "second": metrics},
    )


def matching_dataset(document: Mapping[str, Any]) -> xr.Dataset:
    """Labels which head answers to which: `matched_head` [run_a, run_b, component], "" where runs are not compared."""
    names, entries = [run["name"] for run in document["runs"]], document["matching"]
    heads = list(entries[0]["heads"])
    shape = (len(names), len(names))
    matched = np.full((*shape, len(heads)), "", dtype=object)
    numbers = {name: np.full(shape, np.nan) for name in ("similarity", "similarity_null", "address", "address_null")}
    for entry in entries:
        i, j = names.index(entry["run_a"]), names.index(entry["run_b"])
        matched[i, j] = [entry["heads"][head] for head in heads]
        back = {other: head for head, other in entry["heads"].items()}
        matched[j, i] = [back[head] for head in heads]
        for name in ("similarity", "address"):
            for key, value in ((name, entry[name]["observed"]), (f"{name}_null", entry[name]["null"]["mean"])):
                numbers[key][i, j] = numbers[key][j, i] = np.nan if value is None else value
    found = xr.Dataset(
        {"matched_head": (("run_a", "run_b", "component"), matched.astype(str))},
        coords={"run_a": names, "run_b": names, "component": heads},
    )
    for name, values in numbers.items():
        found[name] = (("run_a", "run_b"), values, {"units": "1"})
    return found


def groups_of(measures: xr.Dataset, document: Mapping[str, Any]) -> Sequence[tuple[str | None, xr.Dataset]]:
    """Lists the groups of `comparison.nc`: the measures at its root, then events, order and matching."""
    return [
        (None, measures),
        ("events", events_dataset(document)),
        ("order", order_dataset(document)),
        ("matching", matching_dataset(document)),
    ]
