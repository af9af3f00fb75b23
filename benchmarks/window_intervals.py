"""Measures how often the intervals of a movement hold the truth, however densely a run is sampled.

    python -m benchmarks.window_intervals

Three measures rise, each along a logistic curve at a step of its own, on four splits. The same run is searched with all
of its 97 checkpoints, with every 2nd and with every 3rd, from each offset. Sampling noise is 0.015 and the wobble of
training 0.008 a checkpoint; rises are 0.3 to 0.9.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.reporting import machine, write_result
from benchmarks.simulated_runs import SPLITS
from kvjax.config.files import find_config, read_config
from kvjax.config.windows import WindowConfig
from kvjax.model.components import Component
from kvjax.windows.find_in_run import find_in_run
from kvjax.windows.summary import window_entries
from kvjax.windows.trajectories import ComponentDrops, Metric, Trajectories

MEASURES = ("answer_accuracy", "r", "key_selectivity")
STEPS = np.arange(1, 98) * 100
SAMPLING, WOBBLE = 0.015, 0.008
MOMENTS = {"onset": "onset_interval", "midpoint": "interval", "completion": "completion_interval"}
_SHARES = np.array([0.1, 0.5, 0.9])
_NOTHING = ComponentDrops((Component(0, 0),), np.zeros((len(STEPS), 1)), np.ones((len(STEPS), 1)), 0.01, 1000)


def simulate(rng: np.random.Generator, width: float, resamples: int) -> tuple[Trajectories, dict[str, np.ndarray]]:
    """Simulates a run whose measures rise over `width` steps from 10 to 90 %, with each measure's true moments."""
    metrics, curves, truth = [], [], {}
    for measure in MEASURES:
        middle, size = rng.uniform(3500, 6500), rng.uniform(0.3, 0.9)
        scale = width / np.log(81)
        truth[measure] = middle + scale * np.log(_SHARES / (1 - _SHARES))
        for split in SPLITS:
            metrics.append(Metric(measure, measure, split))
            curves.append(size / (1 + np.exp(-(STEPS - middle) / scale)) + WOBBLE * rng.standard_normal(len(STEPS)))
    values = np.stack(curves, axis=1) + SAMPLING * rng.standard_normal((len(STEPS), len(metrics)))
    samples = values + SAMPLING * rng.standard_normal((resamples, *values.shape))
    return Trajectories(STEPS, tuple(metrics), values, samples), truth


def subsampled(run: Trajectories, every: int, offset: int) -> Trajectories:
    """Keeps every so many checkpoints of a run."""
    kept = slice(offset, None, every)
    return dataclasses.replace(
        run, steps=run.steps[kept], values_CxM=run.values_CxM[kept], samples_JxCxM=run.samples_JxCxM[:, kept]
    )


def measure(width: float, config: WindowConfig, *, runs: int, seed: int, everies: Sequence[int] = (1, 2, 3)) -> Any:
    """Counts moments found, moments inside their intervals, and intervals of one run that overlap, for each density."""
    rng = np.random.default_rng(seed)
    searched, labels = [], []
    for number in range(runs):
        run, truth = simulate(rng, width, config.resamples)
        for every in everies:
            for offset in range(every):
                searched.append(subsampled(run, every, offset))
                labels.append((number, every, truth))
    rows = {every: {"looked_for": 0, "found": 0, **dict.fromkeys(MOMENTS, 0)} for every in everies}
    widths: dict[tuple[int, str], list[int]] = {(every, moment): [] for every in everies for moment in MOMENTS}
    of_run: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for run, (number, every, truth) in zip(searched, labels, strict=True):
        row = rows[every]
        row["looked_for"] += len(MEASURES)
        windows = window_entries(find_in_run(run, config), _NOTHING, config)
        order = [entry for window in windows for entry in window["order"]]
        for entry in {entry["metric"]: entry for entry in order}.values():
            row["found"] += 1
            for moment, (name, interval) in zip(truth[entry["metric"]], MOMENTS.items(), strict=True):
                low, high = entry[interval] or (np.inf, -np.inf)
                row[name] += bool(low <= moment <= high)
                widths[every, name].append(high - low)
            of_run.setdefault((number, entry["metric"]), []).append(entry["interval"])
    pairs = [(a, b) for found in of_run.values() for i, a in enumerate(found) for b in found[:i]]
    overlapping = sum(a[0] <= b[1] and b[0] <= a[1] for a, b in pairs)
    counted = [
        {
            "every": every,
            **row,
            "widths": {name: float(np.median(widths[every, name])) for name in MOMENTS if widths[every, name]},
        }
        for every, row in rows.items()
    ]
    return {"width": width, "runs": runs, "densities": counted, "pairs": len(pairs), "overlapping": overlapping}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=30, help="simulated runs per row")
    arguments = parser.parse_args()
    config = read_config(find_config("default", "windows"), WindowConfig).model_copy(update={"resamples": 100})
    rows = [measure(width, config, runs=arguments.runs, seed=int(width)) for width in (100, 400, 800, 1600)]
    print("| rise over | checkpoints | found | onset | midpoint | completion | widths | pairs overlap |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        for one in row["densities"]:
            shares = (f"{100 * one[name] / one['found']:.0f} %" if one["found"] else "–" for name in MOMENTS)
            found = f"{100 * one['found'] / one['looked_for']:.0f} %"
            overlap = f"{row['overlapping']} of {row['pairs']}" if one["every"] == 1 else ""
            widths = ", ".join(f"{width:g}" for width in one["widths"].values())
            cells = [f"{row['width']:g} steps", f"every {100 * one['every']}", found, *shares, widths, overlap]
            print("| " + " | ".join(cells) + " |")
    print("written to", write_result("window_intervals", {"machine": machine(), "rows": rows}))


if __name__ == "__main__":
    main()
