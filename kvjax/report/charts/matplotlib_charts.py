"""Draws described charts with matplotlib, for papers: on white, in colours that colour-blind readers tell apart."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import matplotlib
import numpy as np

from kvjax.report.charts.description import COLOURS, NEUTRAL, Band, Bars, Chart, Graph, Heatmap, LineChart, Timeline

matplotlib.use("Agg")  # figures are files; no display is needed
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_MAPS = {"share": "cividis", "size": "cividis", "signed": "RdBu_r"}
_MOST_PANELS = 6  # steps of a stepped chart that are drawn
_MOST_COLUMNS = 3  # of them in a row
_MOST_LABELS, _MOST_ROW_LABELS = 12, 32
_WIDEST_EDGE = 7
_LETTERS_OF_A_LEGEND, _LEGEND_ROW = 120, 0.18  # in a row of it below a figure; inches of a row


@functools.singledispatch
def matplotlib_figure(chart: Chart) -> Figure:
    """Draws a chart; one of several steps gets panels for some of them, the first and the last among them.

    Raises:
      TypeError: the kind of chart is unknown.
    """
    raise TypeError(f"no matplotlib figure for a {type(chart).__name__}")


@matplotlib_figure.register
def _lines(chart: LineChart) -> Figure:
    figure, axis = plt.subplots(figsize=(6.5, 3.6), constrained_layout=True)
    for line in chart.lines:
        style = {"color": line.colour, "alpha": 0.5 if line.faint else 1.0}
        style |= {"linestyle": ":" if line.dashed else "-", "linewidth": 0.9 if line.faint else 1.7}
        if line.stepped:
            axis.step(line.x, line.y, where="post", label=line.name or None, **style)
        else:
            plain = line.faint or line.dashed
            axis.plot(line.x, line.y, label=line.name or None, marker=None if plain else "o", markersize=2.5, **style)
        if line.low is not None and line.high is not None:
            step = "post" if line.stepped else None
            axis.fill_between(line.x, line.low, line.high, color=line.colour, alpha=0.18, linewidth=0, step=step)
    _shade(axis, chart.bands)
    axis.set_xlabel(chart.x_title)
    axis.set_ylabel(chart.y_title)
    if chart.y_range is not None:
        axis.set_ylim(*chart.y_range)
    if any(line.name for line in chart.lines):
        _legend_below(figure, axis)
    return _titled(figure, axis, chart)


@matplotlib_figure.register
def _heatmap(chart: Heatmap) -> Figure:
    values = chart.values if chart.steps is not None else chart.values[None]
    marks = np.zeros(values.shape, bool) if chart.marks is None else chart.marks.reshape(values.shape)
    chosen = _spread(len(values))
    figure, axes = _panels(len(chosen), width=0.9 + 0.3 * len(chart.x), height=0.8 + 0.22 * len(chart.y))
    low, high = chart.ends
    for axis, index in zip(axes, chosen, strict=True):
        image = axis.imshow(
            values[index], aspect="auto", cmap=_MAPS[chart.scale], vmin=low, vmax=high, interpolation="nearest"
        )
        marked_rows, marked_columns = np.nonzero(marks[index])
        axis.plot(
            marked_columns, marked_rows, ".", color="white", markersize=5, markeredgecolor="black", markeredgewidth=0.4
        )
        every = -(-len(chart.x) // _MOST_LABELS)
        shown = range(0, len(chart.x), every)
        long = any(len(chart.x[place]) > 3 for place in shown)
        axis.set_xticks(list(shown), [chart.x[place] for place in shown], rotation=90 if long else 0, fontsize=7)
        rows = range(0, len(chart.y), -(-len(chart.y) // _MOST_ROW_LABELS))
        axis.set_yticks(list(rows), [chart.y[place] for place in rows], fontsize=7)
        axis.set_xlabel(chart.x_title, fontsize=8)
        axis.set_ylabel(chart.y_title, fontsize=8)
        if chart.steps is not None:
            axis.set_title(f"step {chart.steps[index]}", fontsize=9)
        axis.label_outer()
    figure.colorbar(image, ax=axes, label=chart.unit)
    figure.suptitle(chart.title, fontsize=11)
    return figure


@matplotlib_figure.register
def _bars(chart: Bars) -> Figure:
    several = {name: values if chart.steps is not None else values[None] for name, values in chart.series.items()}
    chosen = _spread(len(next(iter(several.values()))))
    figure, axes = _panels(len(chosen), width=0.9 + 0.25 * len(chart.labels) * len(several), height=2.2)
    places = np.arange(len(chart.labels))
    thick = 0.8 / len(several)
    for axis, index in zip(axes, chosen, strict=True):
        for number, (name, values) in enumerate(several.items()):
            shift = (number - (len(several) - 1) / 2) * thick
            axis.bar(places + shift, values[index], thick, color=COLOURS[number % len(COLOURS)], label=name)
        axis.set_xticks(places, chart.labels, fontsize=7, rotation=90 if len(chart.labels) > 6 else 0)
        axis.axhline(0.0, color="black", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if chart.steps is not None:
            axis.set_title(f"step {chart.steps[index]}", fontsize=9)
        axis.set_ylabel(chart.y_title, fontsize=8)
        axis.label_outer()
    if len(several) > 1:
        axes[0].legend(fontsize=7, frameon=False)
    figure.suptitle(chart.title, fontsize=11)
    return figure


@matplotlib_figure.register
def _timeline(chart: Timeline) -> Figure:
    labels = list(dict.fromkeys(span.label for span in chart.spans))
    groups = list(dict.fromkeys(span.group for span in chart.spans))
    figure, axis = plt.subplots(figsize=(7.5, 1.4 + 0.24 * len(labels)), constrained_layout=True)
    for span in chart.spans:
        colour, row = COLOURS[groups.index(span.group) % len(COLOURS)], labels.index(span.label)
        ends = [end for end in (span.start, span.middle, span.end) if end is not None]
        if ends:
            axis.plot([min(ends), max(ends)], [row, row], color=colour, alpha=0.45, linewidth=5)
        if span.middle is not None:
            axis.plot(span.middle, row, "o", color=colour, markersize=5)
    for number, group in enumerate(groups):
        axis.plot([], [], "o", color=COLOURS[number % len(COLOURS)], label=group)
    _shade(axis, chart.bands)
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel(chart.x_title)
    _legend_below(figure, axis)
    return _titled(figure, axis, chart)


@matplotlib_figure.register
def _graph(chart: Graph) -> Figure:
    figure, axis = plt.subplots(figsize=(7.5, 4.2), constrained_layout=True)
    place = {node.name: node for node in chart.nodes}
    largest = max((abs(edge.weight) for edge in chart.edges), default=1.0) or 1.0
    for edge in chart.edges:
        a, b = place[edge.start], place[edge.end]
        width = max(0.8, _WIDEST_EDGE * abs(edge.weight) / largest)
        axis.plot([a.x, b.x], [a.y, b.y], color=COLOURS[0], alpha=0.55, linewidth=width, solid_capstyle="round")
    for node in chart.nodes:
        axis.plot(node.x, node.y, "o", color=NEUTRAL, markersize=8)
        axis.annotate(node.name, (node.x, node.y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=7)
    axis.set_axis_off()
    axis.margins(0.12)
    return _titled(figure, axis, chart)


def _panels(count: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Lays panels out in rows of at most three, none larger than a page has room for; sizes are in inches."""
    columns = min(count, _MOST_COLUMNS)
    rows = -(-count // columns)
    width, height = min(max(width, 1.9), 3.6), min(max(height, 1.5), 4.2)
    size = (max(4.5, columns * width + 1.2), max(2.6, rows * height + 0.8))
    figure, axes = plt.subplots(
        rows, columns, figsize=size, squeeze=False, sharex=True, sharey=True, constrained_layout=True
    )
    for unused in axes.flat[count:]:
        unused.set_visible(False)
    return figure, list(axes.flat[:count])


def _legend_below(figure: Figure, axis: Axes) -> None:
    """Names lines below the axes, where no line runs, in as many columns as the names leave room for."""
    handles, names = axis.get_legend_handles_labels()
    if not names:
        return
    columns = max(1, min(len(names), _LETTERS_OF_A_LEGEND // (max(map(len, names)) + 6)))
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW * -(-len(names) // columns))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=7, frameon=False)


def _titled(figure: Figure, axis: Axes, chart: Chart) -> Figure:
    axis.set_title(chart.title, fontsize=11, pad=18 if getattr(chart, "bands", ()) else 6)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _shade(axis: Axes, bands: Sequence[Band]) -> None:
    for band in bands:
        axis.axvspan(band.start, band.end, color=NEUTRAL, alpha=0.16, linewidth=0)
        middle = (band.start + band.end) / 2
        axis.annotate(
            band.label, (middle, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=7
        )


def _spread(count: int) -> list[int]:
    """Picks at most so many panels as fit side by side, evenly, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, _MOST_PANELS))})
