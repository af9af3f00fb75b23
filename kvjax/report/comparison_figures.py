"""Static figures of a comparison: seeds overlaid, when each formed, and roles followed across seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from kvjax.measure.declaration import HELDOUT_SPLIT
from kvjax.measure.registry import BIRTH_SPLIT
from kvjax.report.figures import LINE_COLOURS, SPLIT_COLOURS


def seeds_figure(dataset: xr.Dataset) -> Figure:
    """Draws answer accuracy on validation and held-out pairs of every run, with the median over runs."""
    splits = [split for split in (BIRTH_SPLIT, HELDOUT_SPLIT) if split in dataset["split"].values]
    figure, axes = plt.subplots(
        1, len(splits), figsize=(6 * len(splits), 3.6), squeeze=False, sharey=True, constrained_layout=True
    )
    for axis, split in zip(axes[0], splits, strict=True):
        accuracy = dataset["answer_accuracy"].sel(split=split).transpose("run", "step")
        for values in accuracy.values:
            axis.plot(accuracy["step"], values, color=SPLIT_COLOURS[split], linewidth=0.9, alpha=0.5)
        median = np.nanmedian(accuracy.values, axis=0)
        axis.plot(accuracy["step"], median, color="black", linewidth=2.0, label=f"median of {len(accuracy)} runs")
        axis.set_title(split, fontsize=11)
        axis.set_xlabel("training step")
        axis.set_ylim(-0.03, 1.03)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False, loc="upper left")
    axes[0][0].set_ylabel("answer accuracy")
    return figure


def births_figure(document: Mapping[str, Any]) -> Figure:
    """Draws the share of runs that have formed each metric over steps, with 95 % limits."""
    figure, axis = plt.subplots(figsize=(7, 3.6), constrained_layout=True)
    end = max(run["steps"][-1] for run in document["runs"])
    for (name, entry), colour in zip(document["births"].items(), LINE_COLOURS, strict=False):
        points = entry["curve"]
        steps = [0, *(point["step"] for point in points), end]
        formed = [0.0, *(1 - point["share"] for point in points)]
        label = f"{name} ≥ {entry['threshold']:g} on {entry['split']} ({entry['formed']} of {entry['total']})"
        axis.step(steps, [*formed, formed[-1]], where="post", color=colour, label=label)
        for point in points:
            if point["low"] is not None:
                axis.vlines(point["step"], 1 - point["high"], 1 - point["low"], color=colour, alpha=0.4)
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("training step")
    axis.set_ylabel("share of runs that have formed it")
    axis.spines[["top", "right"]].set_visible(False)
    if document["births"]:
        axis.legend(fontsize=8, frameon=False)
    return figure


def roles_figure(dataset: xr.Dataset) -> Figure:
    """Draws each role's score over training, followed from run to run wherever its head is: mean and range."""
    roles = dataset["role"].values.tolist()
    figure, axes = plt.subplots(
        1, len(roles), figsize=(4.4 * len(roles), 3.6), squeeze=False, sharey=True, constrained_layout=True
    )
    for axis, role in zip(axes[0], roles, strict=True):
        here = dataset.sel(role=role)
        steps = here["step"].values
        low, high = here["role_trajectory_low"].values, here["role_trajectory_high"].values
        axis.fill_between(steps, low, high, color=LINE_COLOURS[0], alpha=0.2, label="range over runs")
        axis.plot(steps, here["role_trajectory_mean"].values, color=LINE_COLOURS[0], label="mean over runs")
        for values, winner in zip(
            here["role_trajectory"].transpose("run", "step").values, here["role_winner"].values.tolist(), strict=True
        ):
            axis.plot(steps, values, color="black", linewidth=0.6, alpha=0.5)
            axis.annotate(winner, (steps[-1], values[-1]), xytext=(3, 0), textcoords="offset points", fontsize=7)
        axis.set_title(f"{role}: attention × share of effect", fontsize=11)
        axis.set_xlabel("training step")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("role score")
    axes[0][0].legend(fontsize=8, frameon=False, loc="upper left")
    return figure
