"""Charts of a comparison: seeds overlaid, when each formed, and roles followed across seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from kvjax.measure.declaration import HELDOUT_SPLIT
from kvjax.measure.registry import BIRTH_SPLIT
from kvjax.report.charts.description import COLOURS, NEUTRAL, SPLIT_COLOURS, Line, LineChart

_MOST_NAMED = 12  # runs whose lines have names


def comparison_charts(document: Mapping[str, Any], dataset: xr.Dataset) -> list[LineChart]:
    """Draws seeds overlaid, births with censoring, and each role that some run has, followed from run to run."""
    splits = [split for split in (BIRTH_SPLIT, HELDOUT_SPLIT) if split in dataset["split"].values]
    charts = [seeds_chart(dataset, split) for split in splits]
    charts += [births_chart(document)] if document["births"] else []
    found = dataset["role_trajectory"].notnull().any(["run", "step"])
    return [*charts, *(role_chart(dataset, role) for role in dataset["role"].values[found.values].tolist())]


def seeds_chart(dataset: xr.Dataset, split: str) -> LineChart:
    """Draws answer accuracy of every run on a split, with the median over runs."""
    accuracy = dataset["answer_accuracy"].sel(split=split).transpose("run", "step")
    steps, values = accuracy["step"].values, accuracy.values.astype(float)
    named = len(values) <= _MOST_NAMED
    lines = [
        Line(str(run) if named else "", steps, own, colour=_colour(place, named, SPLIT_COLOURS[split]), faint=True)
        for place, (run, own) in enumerate(zip(accuracy["run"].values.tolist(), values, strict=True))
    ]
    middle = np.nanmedian(values, axis=0)
    return LineChart(
        name=f"seeds_{split}",
        title=f"Accuracy on {split}, every run",
        caption=f"Thin: each of {len(values)} runs. Thick: their median at each step.",
        lines=[*lines, Line(f"median of {len(values)} runs", steps, middle, colour=NEUTRAL)],
        y_title="answer accuracy",
        y_range=(-0.03, 1.03),
    )


def _colour(place: int, named: bool, otherwise: str) -> str:
    return COLOURS[place % len(COLOURS)] if named else otherwise


def births_chart(document: Mapping[str, Any]) -> LineChart:
    """Draws the share of runs that have formed each metric over steps, with 95 % limits."""
    end = max(run["steps"][-1] for run in document["runs"])
    lines = []
    for place, (name, entry) in enumerate(document["births"].items()):
        points = entry["curve"]
        steps = np.array([0, *(point["step"] for point in points), end])
        formed = [0.0, *(1 - point["share"] for point in points)]
        low = [0.0, *(np.nan if point["high"] is None else 1 - point["high"] for point in points)]
        high = [0.0, *(np.nan if point["low"] is None else 1 - point["low"] for point in points)]
        label = f"{name} ≥ {entry['threshold']:g} on {entry['split']} ({entry['formed']} of {entry['total']})"
        ends = [np.array([*one, one[-1]], float) for one in (formed, low, high)]
        lines.append(Line(label, steps, *ends, COLOURS[place % len(COLOURS)], stepped=True))
    return LineChart(
        name="births",
        title="How many runs have formed what",
        caption="Share of runs by step (Kaplan and Meier), with 95 % limits. A run in which something has not formed "
        "counts as such until its last checkpoint.",
        lines=lines,
        y_title="share of runs",
        y_range=(-0.03, 1.03),
    )


def role_chart(dataset: xr.Dataset, role: str) -> LineChart:
    """Draws a role's score over training, followed from run to run wherever its head is: mean and range."""
    own = dataset.sel(role=role)
    steps = own["step"].values
    runs = own["run"].values.tolist()
    named = len(runs) <= _MOST_NAMED
    lines = [
        Line(
            f"{run}: {winner or 'none'}" if named else "",
            steps,
            values,
            colour=_colour(place, named, COLOURS[0]),
            faint=True,
        )
        for place, (run, winner, values) in enumerate(
            zip(
                runs,
                own["role_winner"].values.tolist(),
                own["role_trajectory"].transpose("run", "step").values,
                strict=True,
            )
        )
    ]
    mean, low, high = (own[f"role_trajectory_{name}"].values.astype(float) for name in ("mean", "low", "high"))
    return LineChart(
        name=f"role_{role}",
        title=f"The {role}, wherever its head is",
        caption="Attention times the share of the causal effect, of the head that has the role in each run. Thick: the "
        "mean; shaded: the range, over the runs in which a head has it.",
        lines=[*lines, Line("mean over runs", steps, mean, low, high, NEUTRAL)],
        y_title="role score",
    )
