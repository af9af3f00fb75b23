"""How well the model answers: by split, by distance, by every slice, over training."""

from __future__ import annotations

import re

import numpy as np
import xarray as xr

from kvjax.artifacts.results import RunResults
from kvjax.measure import registry
from kvjax.report.charts.description import COLOURS, NEUTRAL, Band, Chart, Heatmap, Line, LineChart
from kvjax.report.parts import Part, Section, section
from kvjax.report.sections.run_data import (
    colour_of_split,
    main_split,
    measured_line,
    splits_of,
    step_labels,
    window_bands,
)
from kvjax.story.wording import count

_BEHAVIOUR = ("answer_accuracy", "answer_margin", "answer_loss", "fixed_margin")
_NULL = "key_selectivity_null"
_DISTANCES = {
    "tokens_since_support": "Accuracy by distance from the value",
    "tokens_since_copy": "Accuracy by distance from the nearest copy",
    "earlier_answers": "Accuracy by earlier answers that can be copied",
}
_MOST_DISTANCES = 6


def behaviour_section(results: RunResults) -> Section:
    """Shows accuracy, margin and loss by split, accuracy by distance with and without copies, and by slice."""
    return section(
        "behaviour",
        "Behaviour",
        "How well reads are answered at each checkpoint, on which kinds of streams, and from how far back.",
        lambda: [
            Part(charts=[*behaviour_charts(results), attention_chart(results)]),
            Part("By distance and by copies", charts=distance_charts(results)),
            Part("Every slice", charts=slice_charts(results), folded=True),
        ],
    )


def behaviour_charts(results: RunResults) -> list[Chart]:
    """Draws accuracy, margin and loss by split over training, with 95 % intervals and birth windows."""
    dataset, intervals, bands = results.metrics, results.intervals, window_bands(results)
    return [
        LineChart(
            name=name,
            title=registry.declared(name).axis_label().partition(" (")[0].capitalize(),
            caption=_explained(dataset[name]) + ", with 95 % intervals over streams. Shaded: birth windows.",
            lines=[
                measured_line(dataset, intervals, name, split, colour_of_split(split, number), split=split)
                for number, split in enumerate(splits_of(dataset))
            ],
            y_title=registry.declared(name).axis_label(),
            y_range=(-0.03, 1.03) if name == "answer_accuracy" else None,
            bands=bands,
        )
        for name in _BEHAVIOUR
        if name in dataset and np.isfinite(dataset[name].values).any()
    ]


def attention_chart(results: RunResults) -> LineChart:
    """Draws the measures of attention to the answer over training, with the null of key selectivity."""
    dataset, split = results.metrics, main_split(results.metrics)
    attention = [
        measure
        for measure in registry.MEASURES
        if measure.panel == "attention" and measure.name in dataset and measure.name != _NULL
    ]
    lines = [
        measured_line(
            dataset, results.intervals, own.name, own.axis_label(), COLOURS[place % len(COLOURS)], split=split
        )
        for place, own in enumerate(attention)
    ]
    if _NULL in dataset:
        null = dataset[_NULL].sel(split=split)
        lines.append(
            Line("key selectivity, null", null["step"].values, null.values.astype(float), colour=NEUTRAL, dashed=True)
        )
    return LineChart(
        name="attention",
        title="Attention to the answer",
        caption=f"On {split}, with 95 % intervals. Dotted: the same share for another key of the stream, which tells "
        "nothing of a lookup. Shaded: birth windows.",
        lines=lines,
        y_title="attention",
        y_range=(-0.03, 1.03),
        bands=window_bands(results),
    )


def distance_charts(results: RunResults) -> list[Chart]:
    """Draws accuracy by how far back a value stands, by the nearest copy of it, and by the copies there are."""
    dataset, split, bands = results.metrics, main_split(results.metrics), window_bands(results)
    charts = []
    for axis, title in _DISTANCES.items():
        places = slices_of(dataset, axis, split)
        if places:
            charts.append(_by_value(results, axis, title, places, split, bands))
    return charts


def _by_value(
    results: RunResults, axis: str, title: str, places: dict[str, int], split: str, bands: list[Band]
) -> LineChart:
    chosen = list(places)
    if len(chosen) > _MOST_DISTANCES:
        chosen = [chosen[round(at)] for at in np.linspace(0, len(chosen) - 1, _MOST_DISTANCES)]
    lines = [
        measured_line(
            results.metrics,
            results.intervals,
            "slice_accuracy",
            f"{value} ({count(places[value], 'read')})",
            COLOURS[number % len(COLOURS)],
            split=split,
            axis_value=f"{axis}={value}",
        )
        for number, value in enumerate(chosen)
    ]
    return LineChart(
        name=f"accuracy_by_{axis}",
        title=title,
        caption=f"Answer accuracy on {split} by `{axis}`, with 95 % intervals; in brackets the number "
        "of reads of each line.",
        lines=lines,
        y_title="answer accuracy",
        y_range=(-0.03, 1.03),
        bands=bands,
    )


def slice_charts(results: RunResults) -> list[Chart]:
    """Draws the accuracy of every slice at every checkpoint, a map for each split."""
    dataset = results.metrics
    charts = []
    for split in splits_of(dataset):
        own = dataset["slice_accuracy"].sel(split=split).transpose("axis_value", "step")
        kept = np.isfinite(own.values).any(axis=1)
        charts.append(
            Heatmap(
                name=f"slices_{split}",
                title=f"Accuracy of every slice of {split}",
                caption="A row for each value of each axis of the streams and reads (docs/definitions.md names them).",
                x=step_labels(dataset),
                y=own["axis_value"].values[kept].tolist(),
                values=own.values[kept].astype(float),
                x_title="training step",
                y_title="",
                unit="answer accuracy",
                scale="share",
            )
        )
    return charts


def slices_of(dataset: xr.Dataset, axis: str, split: str) -> dict[str, int]:
    """Finds the values of an axis that a split has reads of: value -> number of reads, in the order of the numbers."""
    counts = dataset["slice_count"].sel(split=split)
    found = {}
    for label, reads in zip(counts["axis_value"].values.tolist(), counts.values.tolist(), strict=True):
        name, _, value = label.partition("=")
        if name == axis and reads > 0:
            found[value] = int(reads)
    return dict(sorted(found.items(), key=lambda item: int(re.match(r"\d+", item[0])[0])))


def _explained(values: xr.DataArray) -> str:
    text = str(values.attrs["long_name"])
    return text[:1].upper() + text[1:]
