"""Picks what the sections of a run share: splits, steps, window bands, leading components."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from kvjax.artifacts.results import RunResults
from kvjax.errors import InputError
from kvjax.measure.declaration import HELDOUT_SPLIT
from kvjax.measure.registry import ALL_SPLITS, BIRTH_SPLIT
from kvjax.model.components import all_heads
from kvjax.report.charts.description import COLOURS, SPLIT_COLOURS, Band, Line

_SPLITS_FIRST = (BIRTH_SPLIT, HELDOUT_SPLIT)


def splits_of(dataset: xr.Dataset) -> list[str]:
    """Lists the splits of a sweep, validation and held-out pairs first."""
    splits = [split for split in dataset["split"].values.tolist() if split != ALL_SPLITS]
    return sorted(splits, key=lambda split: (split not in _SPLITS_FIRST, split != BIRTH_SPLIT))


def main_split(dataset: xr.Dataset) -> str:
    """Names the split that components are shown on: the one that births are on, or all splits together."""
    return BIRTH_SPLIT if BIRTH_SPLIT in dataset["split"].values else ALL_SPLITS


def colour_of_split(split: str, number: int = 0) -> str:
    """Names the colour of a split, the same in every chart."""
    return SPLIT_COLOURS.get(split, COLOURS[(number + 4) % len(COLOURS)])


def window_bands(results: RunResults) -> list[Band]:
    """Lists the run's birth windows as shaded stretches; none if they were not looked for or are stale."""
    try:
        windows = results.windows.windows
    except InputError:
        return []
    return [Band(window.start_step, window.end_step, f"window {window.center_step}") for window in windows]


def head_names(dataset: xr.Dataset) -> list[str]:
    """Names the heads in the order in which `[layer, head]` is laid out flat."""
    return list(map(str, all_heads(dataset.sizes["layer"], dataset.sizes["head"])))


def measured_line(
    dataset: xr.Dataset, intervals: xr.Dataset | None, name: str, label: str, colour: str, **where: str
) -> Line:
    """Draws a measure over steps with its interval, if it has one."""
    values = dataset[name].sel(where)
    low = high = None
    if intervals is not None and name in intervals:
        own = intervals[name].sel(where)
        low, high = own.sel(statistic="low").values, own.sel(statistic="high").values
    return Line(label, values["step"].values, values.values.astype(float), low, high, colour)


def by_step(values: xr.DataArray, rows: str) -> np.ndarray:
    """Lays a measure out as a map with a column for each step: [rows, steps]."""
    return values.transpose(rows, "step").values.astype(float)


def step_labels(dataset: xr.Dataset) -> list[str]:
    """Writes the steps as labels of a map's columns."""
    return [str(step) for step in dataset["step"].values.tolist()]


def steps_of(dataset: xr.Dataset) -> tuple[int, ...]:
    """Lists the steps as plain numbers."""
    return tuple(int(step) for step in dataset["step"].values)


def largest(names: Sequence[str], values: np.ndarray, most: int) -> list[str]:
    """Picks the rows of [names, steps] with the largest values anywhere, in the order of `names`."""
    peak = np.nan_to_num(np.where(np.isfinite(values), values, -np.inf).max(axis=1), neginf=-np.inf)
    chosen = set(np.argsort(-peak, kind="stable")[:most].tolist())
    return [name for place, name in enumerate(names) if place in chosen]
