"""What the residual stream and the weights hold and how they move: probes, logit lens, drift, spectra, ranks."""

from __future__ import annotations

import numpy as np
import xarray as xr

from kvjax.artifacts.results import RunResults
from kvjax.report.charts.description import COLOURS, Chart, Heatmap, Line, LineChart
from kvjax.report.parts import Part, Section, section
from kvjax.report.sections.run_data import (
    by_step,
    head_names,
    largest,
    main_split,
    measured_line,
    step_labels,
    window_bands,
)

_TARGETS = {"query_key": "key read", "value": "current value", "stale_value": "stale value"}
_PLACES = {"prediction": "where the answer is predicted", "support": "where the value stands"}
_MOST_HEADS = 6


def probes_section(results: RunResults) -> Section:
    """Shows what probes and the logit lens read at each stage, beside what chance gives."""
    return section(
        "probes",
        "Probes and logit lens",
        "What can be read off the residual stream at each stage and step. A dot marks what chance gives as well.",
        lambda: [
            Part("Trained probes", charts=probe_charts(results)),
            Part("Logit lens", charts=lens_charts(results)),
        ],
    )


def probe_charts(results: RunResults) -> list[Chart]:
    """Draws stage × step maps of the accuracy of trained probes; a dot marks cells that do not exceed their null."""
    dataset, split = results.metrics, main_split(results.metrics)
    charts: list[Chart] = []
    if "probe_accuracy" in dataset:
        for target, what in _TARGETS.items():
            for place, where in _PLACES.items():
                here = {"split": split, "target": target, "position_role": place}
                values = dataset["probe_accuracy"].sel(here)
                null = dataset["probe_null"].sel(here) if "probe_null" in dataset else None
                charts.append(_map(results, values, null, f"probe_{target}_{place}", f"Probe of the {what}, {where}"))
    if "probe_current_vs_stale_binary" in dataset:
        for place, where in _PLACES.items():
            here = {"split": split, "position_role": place}
            values = dataset["probe_current_vs_stale_binary"].sel(here)
            null = dataset["probe_current_vs_stale_binary_null"].sel(here)
            title = f"Current or stale value, {where}"
            charts.append(_map(results, values, null, f"probe_current_vs_stale_{place}", title))
    return [chart for chart in charts if np.isfinite(chart.values).any()]


def lens_charts(results: RunResults) -> list[Chart]:
    """Draws stage × step maps of what the logit lens answers."""
    dataset, split = results.metrics, main_split(results.metrics)
    names = {
        "lens_answer_accuracy": "Answer, where it is predicted",
        "lens_query_key_accuracy": "Key read, at the read",
        "lens_support_value_accuracy": "Value, where it stands",
    }
    return [
        _map(results, dataset[name].sel(split=split), None, name, title)
        for name, title in names.items()
        if name in dataset
    ]


def _map(results: RunResults, values: xr.DataArray, null: xr.DataArray | None, name: str, title: str) -> Heatmap:
    grid = by_step(values, "stage")
    marks = None if null is None else np.isfinite(grid) & ~(grid > by_step(null, "stage"))
    dots = "" if null is None else " A dot: not above the 95th percentile of probes fitted to permuted labels."
    return Heatmap(
        name=name,
        title=title,
        caption=f"On {main_split(results.metrics)}: {values.attrs['long_name']}.{dots}",
        x=step_labels(results.metrics),
        y=values["stage"].values.tolist(),
        values=grid,
        x_title="training step",
        y_title="",
        unit="accuracy",
        scale="share",
        marks=marks,
    )


def change_section(results: RunResults) -> Section:
    """Shows how states, weights and the order of components change from checkpoint to checkpoint."""
    return section(
        "change",
        "Drift, weights and ranks",
        "How far states and weights moved between checkpoints, how many directions weights use, whether the order of "
        "components holds.",
        lambda: [
            Part("States", charts=drift_charts(results)),
            Part("Weights", charts=weight_charts(results)),
            Part("Order of components", charts=rank_charts(results)),
        ],
    )


def drift_charts(results: RunResults) -> list[Chart]:
    """Draws stage × step maps of drift and of CKA, to the previous and to the reference checkpoint."""
    dataset, split = results.metrics, main_split(results.metrics)
    names = {
        "residual_drift": ("Drift from the previous checkpoint", "size"),
        "residual_drift_to_reference": ("Drift to the reference", "size"),
        "residual_cka": ("CKA with the previous checkpoint", "share"),
        "residual_cka_to_reference": ("CKA with the reference", "share"),
    }
    return [
        Heatmap(
            name=name,
            title=title,
            caption=f"On {split}, where answers are predicted: {dataset[name].attrs['long_name']}.",
            x=step_labels(dataset),
            y=dataset["stage"].values.tolist(),
            values=by_step(dataset[name].sel(split=split, position_role="prediction"), "stage"),
            x_title="training step",
            y_title="",
            unit="CKA" if scale == "share" else "1 − cosine",
            scale=scale,
        )
        for name, (title, scale) in names.items()
        if name in dataset and np.isfinite(dataset[name].values).any()
    ]


def weight_charts(results: RunResults) -> list[Chart]:
    """Draws the effective rank of the leading heads' matrices, their singular values, and how fast weights change."""
    dataset = results.metrics
    charts: list[Chart] = []
    if "head_effective_rank" in dataset:
        kind, split = str(dataset.attrs["ranked_by"]), main_split(dataset)
        drops = dataset["head_accuracy_drop"].sel(ablation=kind, split=split).stack(component=("layer", "head"))
        names = head_names(dataset)
        leading = largest(names, by_step(drops, "component"), _MOST_HEADS)
        for matrix, title in (("qk", "what heads look for (W_QK)"), ("ov", "what heads write (W_OV)")):
            ranks = dataset["head_effective_rank"].sel(matrix=matrix).stack(component=("layer", "head"))
            grid = by_step(ranks, "component")
            charts.append(
                LineChart(
                    name=f"effective_rank_{matrix}",
                    title=f"Effective rank of {title}",
                    caption="How many directions the matrix uses: exp of the entropy of its singular values. The "
                    "heads whose ablation costs most.",
                    lines=[
                        Line(name, dataset["step"].values, grid[names.index(name)], colour=COLOURS[at % len(COLOURS)])
                        for at, name in enumerate(leading)
                    ],
                    y_title="directions",
                    bands=window_bands(results),
                )
            )
            spectra = dataset["head_singular_values"].sel(matrix=matrix).stack(component=("layer", "head"))
            chosen = [names.index(name) for name in leading]
            charts.append(
                Heatmap(
                    name=f"singular_values_{matrix}",
                    title=f"Singular values of {title}",
                    caption="The largest on the left; LayerNorm gains folded in.",
                    x=[str(place + 1) for place in dataset["singular_value"].values.tolist()],
                    y=leading,
                    values=spectra.transpose("step", "component", "singular_value").values[:, chosen].astype(float),
                    x_title="direction",
                    y_title="",
                    unit="singular value",
                    steps=tuple(int(step) for step in dataset["step"].values),
                )
            )
    for name, title in (("weight_change", "Change of weights"), ("weight_update_cosine", "Direction of change")):
        if name in dataset and np.isfinite(dataset[name].values).any():
            grid = by_step(dataset[name], "tensor_group")
            known = np.isfinite(grid).any(axis=1)  # tied weights have no unembedding of their own
            charts.append(
                Heatmap(
                    name=name,
                    title=title,
                    caption=f"{str(dataset[name].attrs['long_name']).capitalize()}.",
                    x=step_labels(dataset),
                    y=dataset["tensor_group"].values[known].tolist(),
                    values=grid[known],
                    x_title="training step",
                    y_title="",
                    unit="per 1000 steps" if name == "weight_change" else "cosine",
                    scale="size" if name == "weight_change" else "signed",
                )
            )
    return charts


def rank_charts(results: RunResults) -> list[Chart]:
    """Draws whether the order of components by what they cost holds from one checkpoint to the next."""
    dataset, split = results.metrics, main_split(results.metrics)
    parts = {
        "rank correlation of heads": "head_rank_correlation_prev",
        "rank correlation of MLPs": "mlp_rank_correlation_prev",
        "turnover of the top heads": "head_turnover",
    }
    lines = [
        measured_line(dataset, None, name, label, COLOURS[at], split=split)
        for at, (label, name) in enumerate(parts.items())
        if name in dataset and np.isfinite(dataset[name].values).any()
    ]
    if not lines:
        return []
    return [
        LineChart(
            name="ranks",
            title="Whether the order of components holds",
            caption=f"On {split}: Spearman correlation of what ablations cost with the previous checkpoint, and the "
            "share of top heads that left or joined.",
            lines=lines,
            y_title="correlation, or share",
            bands=window_bands(results),
        )
    ]
