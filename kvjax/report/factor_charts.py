"""Charts of a factor: what its settings do over training, and when things formed in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from kvjax.measure.declaration import HELDOUT_SPLIT
from kvjax.measure.registry import ALL_SPLITS, BIRTH_SPLIT
from kvjax.report.charts.description import COLOURS, Line, LineChart, Span, Timeline


def factor_charts(document: Mapping[str, Any], trajectories: Mapping[str, xr.Dataset]) -> list[LineChart | Timeline]:
    """Draws accuracy on two splits, the drift of the residual stream, and births; a colour for each setting.

    Args:
      document: of `factor.json`.
      trajectories: label -> measures of the setting's runs, [run, step, …].
    """
    courses = {
        "accuracy_validation": (f"Accuracy on {BIRTH_SPLIT}", lambda one: _of_split(one, BIRTH_SPLIT)),
        "accuracy_heldout": (f"Accuracy on {HELDOUT_SPLIT}", lambda one: _of_split(one, HELDOUT_SPLIT)),
        "drift": ("Drift of the residual stream at the reads", _drift),
    }
    charts = []
    for name, (title, values_of) in courses.items():
        lines = [
            line
            for place, (label, one) in enumerate(trajectories.items())
            if (values := values_of(one)) is not None
            for line in _lines(values, label, COLOURS[place % len(COLOURS)])
        ]
        if lines:
            charts.append(_chart(name, title, lines))
    births = [
        Span(
            f"{metric}: {entry['label']}",
            None,
            float(own["step"]),
            None,
            _state(own),
        )
        for entry in document["settings"]
        for metric, event in entry["births"].items()
        for own in event["runs"]
    ]
    if births:
        charts.append(
            Timeline(
                name="births",
                title="When seeds formed what",
                caption="A dot for each seed: the checkpoint at which it had formed it, or the last without.",
                spans=sorted(births, key=lambda span: span.label.partition(":")[0]),
            )
        )
    return charts


def _chart(name: str, title: str, lines: list[Line]) -> LineChart:
    accuracy = name != "drift"
    return LineChart(
        name=name,
        title=title,
        caption="Thin: each seed. Thick: the median over the seeds of a setting.",
        lines=lines,
        y_title="answer accuracy" if accuracy else "mean over stages, from one checkpoint to the next",
        y_range=(-0.03, 1.03) if accuracy else None,
    )


def _state(own: Mapping[str, Any]) -> str:
    if own["formed"]:
        return "formed"
    since = own["unconfirmed_step"]
    return "not formed by then" if since is None else f"seems formed from step {since} on, not confirmed"


def _lines(values: xr.DataArray, label: str, colour: str) -> list[Line]:
    values = values.transpose("run", "step")
    steps = values["step"].values
    known = np.isfinite(values.values).any(axis=0)
    middle = np.nanmedian(values.values[:, known], axis=0)
    seeds = f"{len(values)} seed{'s' if len(values) != 1 else ''}"
    thin = [Line("", steps, own.astype(float), colour=colour, faint=True) for own in values.values]
    return [*thin, Line(f"{label} ({seeds})", steps[known], middle.astype(float), colour=colour)]


def _of_split(one: xr.Dataset, split: str) -> xr.DataArray | None:
    if "answer_accuracy" not in one or split not in one["split"].values:
        return None
    return one["answer_accuracy"].sel(split=split)


def _drift(one: xr.Dataset) -> xr.DataArray | None:
    if "residual_drift" not in one:
        return None
    values = one["residual_drift"]
    for dim, value in (("split", ALL_SPLITS), ("position_role", "prediction")):
        values = values.sel({dim: value}) if dim in values.dims else values
    return values.mean([dim for dim in values.dims if dim not in ("run", "step")])
