"""Static figures of a factor: what its settings do over training, and when things formed in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvjax.measure.declaration import HELDOUT_SPLIT
from kvjax.measure.registry import ALL_SPLITS, BIRTH_SPLIT
from kvjax.report.figures import LINE_COLOURS


def settings_figure(trajectories: Mapping[str, xr.Dataset], *, factor: str) -> Figure:
    """Draws accuracy on two splits and the drift of the residual stream, a colour per setting.

    Args:
      trajectories: label -> measures of the setting's runs, [run, step, …].
      factor: its name, the title.
    """
    panels = [
        (f"accuracy, {BIRTH_SPLIT}", lambda one: _of_split(one, "answer_accuracy", BIRTH_SPLIT), "answer accuracy"),
        (f"accuracy, {HELDOUT_SPLIT}", lambda one: _of_split(one, "answer_accuracy", HELDOUT_SPLIT), "answer accuracy"),
        ("drift of the stream at the reads", _drift, "mean over stages, per 1000 steps"),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.8 * len(panels), 3.6), constrained_layout=True)
    for axis, (title, values_of, unit) in zip(axes, panels, strict=True):
        for (label, one), colour in zip(trajectories.items(), LINE_COLOURS, strict=False):
            values = values_of(one)
            if values is not None:
                _draw(axis, values, label, colour)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("training step")
        axis.set_ylabel(unit)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:2]:
        axis.set_ylim(-0.03, 1.03)
    axes[0].legend(fontsize=8, frameon=False, title=factor, title_fontsize=8)
    return figure


def _draw(axis: Axes, values: xr.DataArray, label: str, colour: str) -> None:
    values = values.transpose("run", "step")
    for own in values.values:
        axis.plot(values["step"], own, color=colour, linewidth=0.8, alpha=0.45)
    known = np.isfinite(values.values).any(axis=0)
    median = np.nanmedian(values.values[:, known], axis=0)
    seeds = f"{len(values)} seed{'s' if len(values) != 1 else ''}"
    axis.plot(values["step"].values[known], median, color=colour, linewidth=2.0, label=f"{label} ({seeds})")


def _of_split(one: xr.Dataset, name: str, split: str) -> xr.DataArray | None:
    return one[name].sel(split=split) if name in one and split in one["split"].values else None


def _drift(one: xr.Dataset) -> xr.DataArray | None:
    if "residual_drift" not in one:
        return None
    values = one["residual_drift"]
    for dim, value in (("split", ALL_SPLITS), ("position_role", "prediction")):
        values = values.sel({dim: value}) if dim in values.dims else values
    return values.mean([dim for dim in values.dims if dim not in ("run", "step")])


def births_by_setting_figure(document: Mapping[str, Any]) -> Figure:
    """Draws when each seed formed each metric, a row per setting; an arrow marks a run that had not."""
    metrics = list(dict.fromkeys(name for entry in document["settings"] for name in entry["births"]))
    labels = [entry["label"] for entry in document["settings"]]
    figure, axes = plt.subplots(
        1,
        max(1, len(metrics)),
        figsize=(3.6 * max(1, len(metrics)), 0.7 * len(labels) + 1.6),
        squeeze=False,
        sharex=True,
        sharey=True,
        constrained_layout=True,
    )
    for axis, metric in zip(axes[0], metrics, strict=False):
        for row, (entry, colour) in enumerate(zip(document["settings"], LINE_COLOURS, strict=False)):
            reached = entry["births"].get(metric, {"runs": []})["runs"]
            for own, offset in zip(reached, np.linspace(-0.2, 0.2, max(2, len(reached))), strict=False):
                marker = "o" if own["formed"] else ">"
                face = colour if own["formed"] else "none"
                axis.plot(
                    own["step"], row + offset, marker, color=colour, markerfacecolor=face, markersize=8, alpha=0.8
                )
        axis.set_title(metric.replace("_", " "), fontsize=10)
        axis.set_xlabel("training step")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_xlim(0, 1.05 * max((own["step"] for own in _reached(document)), default=1))
    axes[0][0].set_yticks(range(len(labels)), labels)
    axes[0][0].set_ylim(len(labels) - 0.5, -0.5)
    return figure


def _reached(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [own for entry in document["settings"] for event in entry["births"].values() for own in event["runs"]]
