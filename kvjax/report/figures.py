"""Static figures of a sweep: trajectories of behaviour and attention, and head ablations over training."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import xarray as xr

from kvjax.artifacts.files import Replace, replace_file
from kvjax.measure import registry
from kvjax.measure.registry import ALL_SPLITS, BIRTH_SPLIT
from kvjax.model.components import all_heads
from kvjax.report.charts.description import COLOURS, SPLIT_COLOURS, Chart

matplotlib.use("Agg")  # figures are files; no display is needed
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_OTHER_COLOUR = "#555555"
_FORMATS = ("png", "svg")
_MOST_STEP_LABELS = 8


def trajectory_figure(runs: Sequence[xr.Dataset]) -> Figure:
    """Draws accuracy and margin per split, and the measures of the attention panel, over training; one row per run."""
    figure, axes = plt.subplots(
        len(runs), 3, figsize=(13, 3.1 * len(runs)), squeeze=False, sharex=True, constrained_layout=True
    )
    accuracy, margin = registry.declared("answer_accuracy"), registry.declared("answer_margin")
    for row, run in zip(axes, runs, strict=True):
        splits = [split for split in run["split"].values.tolist() if split != ALL_SPLITS]
        for split in splits:
            colour = SPLIT_COLOURS.get(split, _OTHER_COLOUR)
            here = run.sel(split=split)
            _line(row[0], here[accuracy.name], split, colour)
            _line(row[1], here[margin.name], split, colour)
        shown = run.sel(split=BIRTH_SPLIT if BIRTH_SPLIT in splits else ALL_SPLITS)
        attention = [measure for measure in registry.MEASURES if measure.panel == "attention" and measure.name in run]
        for measure, colour in zip(attention, itertools.cycle(COLOURS), strict=False):
            _line(row[2], shown[measure.name], measure.axis_label(), colour)
        row[0].set_ylabel(f"{_title(run)}\n{accuracy.axis_label()}")
        row[0].set_ylim(-0.03, 1.03)
        row[1].set_ylabel(margin.axis_label())
        row[1].axhline(0.0, color="black", linewidth=0.6)
        row[2].set_ylabel(f"attention ({shown['split'].values!s})")
        row[2].set_ylim(-0.03, 1.03)
    for axis, title in zip(axes[0], ("Answer accuracy", "Answer margin", "Attention to the answer"), strict=True):
        axis.set_title(title, fontsize=11)
    for axis in axes[-1]:
        axis.set_xlabel("training step")
    for axis in (axes[0][0], axes[0][2]):
        axis.legend(fontsize=8, frameon=False, loc="upper left")
    return figure


def head_ablation_figure(runs: Sequence[xr.Dataset]) -> Figure:
    """Draws, for each run, a map of the accuracy that every head's ablation costs at every checkpoint.

    The kind of ablation is the one that ranks components in the run's sweep.
    """
    figure, axes = plt.subplots(
        1, len(runs), figsize=(1.5 + 5.2 * len(runs), 4.2), squeeze=False, constrained_layout=True
    )
    kinds = [run.attrs.get("ranked_by", "zero") for run in runs]
    drops = [
        run["head_accuracy_drop"].sel(split=ALL_SPLITS, ablation=kind) for run, kind in zip(runs, kinds, strict=True)
    ]
    limit = max(0.05, *(float(np.abs(drop).max()) for drop in drops))
    for axis, run, drop in zip(axes[0], runs, drops, strict=True):
        layers, heads = run.sizes["layer"], run.sizes["head"]
        grid = drop.transpose("layer", "head", "step").values.reshape(layers * heads, -1)
        image = axis.imshow(grid, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axis.set_yticks(range(layers * heads), list(map(str, all_heads(layers, heads))))
        steps = run["step"].values
        every = -(-len(steps) // _MOST_STEP_LABELS)
        shown = np.arange(every - 1, len(steps), every)  # checkpoints saved at regular steps get round labels
        axis.set_xticks(shown, steps[shown])
        for boundary in range(1, layers):
            axis.axhline(boundary * heads - 0.5, color="black", linewidth=0.8)
        axis.set_xlabel("training step")
        axis.set_title(_title(run), fontsize=11)
    named = " or ".join(kind.replace("_", "-") for kind in dict.fromkeys(kinds))
    figure.colorbar(image, ax=axes[0].tolist(), label=f"accuracy lost by {named} ablation")
    return figure


def save_figure(figure: Figure, folder: Path, name: str, *, replace: Replace = replace_file) -> list[Path]:
    """Writes a figure as PNG and SVG, each replaced whole, and returns the paths; equal figures give equal files."""
    paths = []
    for form in _FORMATS:
        path, dated = folder / f"{name}.{form}", {"metadata": {"Date": None}} if form == "svg" else {}
        with replace(path) as partial, plt.rc_context({"svg.hashsalt": name}):  # ids are drawn without it
            figure.savefig(partial, format=form, dpi=150, **dated)
        paths.append(path)
    plt.close(figure)
    return paths


def save_charts(charts: Iterable[Chart], folder: Path, *, replace: Replace) -> list[Path]:
    """Writes charts as PNG and SVG under their names, and returns the paths."""
    return [path for chart in charts for path in save_figure(chart.matplotlib(), folder, chart.name, replace=replace)]


def _line(axis: Axes, values: xr.DataArray, label: str, colour: str) -> None:
    axis.plot(
        values["step"].values, values.values, label=label, color=colour, linewidth=1.6, marker="o", markersize=2.5
    )
    axis.spines[["top", "right"]].set_visible(False)


def _title(run: xr.Dataset) -> str:
    return f"seed {run.attrs['seed']}" if "seed" in run.attrs else run.attrs["run_name"]
