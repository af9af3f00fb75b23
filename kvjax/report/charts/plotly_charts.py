"""Draws described charts with plotly; colours of text and paper are left to the page, which may be dark."""

from __future__ import annotations

import functools
import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from kvjax.report.charts.description import (
    COLOURS,
    NEUTRAL,
    Band,
    Bars,
    Chart,
    Graph,
    Heatmap,
    Line,
    LineChart,
    Timeline,
)

_SCALES = {"share": "Cividis", "size": "Cividis", "signed": "RdBu_r"}
_PLACES = {"share": 3}  # decimal places of a scale's numbers; others have four significant digits
_DOT = "•"
_ROW_HEIGHT, _LOW_ROW_HEIGHT = 22, 9  # pixels of a row of a heatmap or timeline; of one with many rows and columns
_FINE = 36  # rows and columns from which on a heatmap is fine-grained
_WIDEST_EDGE = 9
_LEGEND = {"orientation": "h", "y": -0.3, "yanchor": "top", "x": 0}
_HEIGHT, _LEGEND_ROW, _LEGEND_WIDTH = (
    320,
    20,
    70,
)  # pixels of a chart and of a further row of its legend; letters in a row


@functools.singledispatch
def plotly_figure(chart: Chart) -> go.Figure:
    """Draws a chart; one of several steps gets a frame for each, and a slider.

    Raises:
      TypeError: the kind of chart is unknown.
    """
    raise TypeError(f"no plotly figure for a {type(chart).__name__}")


@plotly_figure.register
def _lines(chart: LineChart) -> go.Figure:
    traces = [trace for number, line in enumerate(chart.lines) for trace in _line_traces(line, number)]
    layout = _layout(chart, height=_height([line.name for line in chart.lines if line.name]))
    layout |= {"xaxis": {"title": {"text": chart.x_title}}, "yaxis": {"title": {"text": chart.y_title}}}
    if chart.y_range is not None:
        layout["yaxis"]["range"] = list(chart.y_range)
    layout |= _shaded(chart.bands)
    layout["legend"] = dict(_LEGEND)
    layout["hovermode"] = "x unified"
    return go.Figure(data=traces, layout=layout)


def _line_traces(line: Line, number: int) -> list[dict[str, Any]]:
    group = f"line{number}"
    shape = "hv" if line.stepped else "linear"
    traces = []
    if line.low is not None and line.high is not None:
        ends = (line.x, line.low, line.high)
        at, low, high = map(_held, ends, (True, False, False)) if line.stepped else ends
        x, y = np.concatenate([at, at[::-1]]), np.concatenate([high, low[::-1]])
        seen = np.isfinite(y)
        band = {"type": "scatter", "x": _plain(x[seen]), "y": _plain(y[seen]), "fill": "toself", "mode": "lines"}
        look = {"line": {"width": 0, "shape": "linear"}, "fillcolor": _transparent(line.colour, 0.18)}
        traces.append(band | look | {"hoverinfo": "skip", "showlegend": False, "legendgroup": group})
    width = 1.4 if line.faint else 2
    traces.append(
        {
            "type": "scatter",
            "x": _plain(line.x),
            "y": _plain(line.y),
            "name": _escaped(line.name),
            "showlegend": bool(line.name),
            "legendgroup": group,
            "mode": "lines" if line.faint or line.dashed else "lines+markers",
            "opacity": 0.75 if line.faint else 1.0,
            "marker": {"size": 5, "color": line.colour},
            "line": {"color": line.colour, "width": width, "dash": "dot" if line.dashed else "solid", "shape": shape},
        }
    )
    if not line.name:
        traces[-1]["hoverinfo"] = "skip"
    return traces


def _held(values: np.ndarray, moves_first: bool) -> np.ndarray:
    """Repeats points so that straight lines between them are steps: x moves first, then the level."""
    twice = np.repeat(values, 2)
    return twice[1:] if moves_first else twice[:-1]


@plotly_figure.register
def _heatmap(chart: Heatmap) -> go.Figure:
    values = chart.values if chart.steps is not None else chart.values[None]
    low, high = chart.ends
    fine = min(len(chart.x), len(chart.y)) > _FINE
    trace = {
        "type": "heatmap",
        "x": list(map(_escaped, chart.x)),
        "y": list(map(_escaped, chart.y)),
        "zmin": low,
        "zmax": high,
        "colorscale": _SCALES[chart.scale],
        "xgap": 0 if fine else 1,
        "ygap": 0 if fine else 1,
        "colorbar": {"title": {"text": chart.unit, "side": "right"}, "thickness": 12},
        "hovertemplate": f"{chart.y_title} %{{y}}<br>{chart.x_title} %{{x}}<br>%{{z:.4g}}<extra></extra>",
    }
    frames: list[dict[str, Any]] = [{"z": _plain(of_step, places=_PLACES.get(chart.scale))} for of_step in values]
    if chart.marks is not None:
        trace |= {"texttemplate": "%{text}", "textfont": {"size": 14}}
        for frame, of_step in zip(frames, chart.marks.reshape(values.shape), strict=True):
            frame["text"] = np.where(of_step, _DOT, "").tolist()
    layout = _layout(chart, height=110 + (_LOW_ROW_HEIGHT if fine else _ROW_HEIGHT) * max(4, len(chart.y)))
    layout["xaxis"] = {"title": {"text": chart.x_title}, "type": "category", "automargin": True, "showgrid": False}
    layout["yaxis"] = {
        "title": {"text": chart.y_title},
        "type": "category",
        "autorange": "reversed",
        "automargin": True,
        "showgrid": False,
    }
    return _stepped(chart, [trace], [[frame] for frame in frames], layout)


@plotly_figure.register
def _bars(chart: Bars) -> go.Figure:
    several = {name: values if chart.steps is not None else values[None] for name, values in chart.series.items()}
    traces = [
        {
            "type": "bar",
            "x": list(map(_escaped, chart.labels)),
            "name": _escaped(name),
            "marker": {"color": COLOURS[number % len(COLOURS)]},
        }
        for number, name in enumerate(several)
    ]
    count = len(next(iter(several.values())))
    frames = [[{"y": _plain(values[step])} for values in several.values()] for step in range(count)]
    everything = np.concatenate([values.ravel() for values in several.values()])
    finite = everything[np.isfinite(everything)]
    low, high = min(0.0, finite.min(initial=0.0)), max(0.0, finite.max(initial=0.0))
    room = 0.05 * (high - low or 1.0)
    layout = _layout(chart, height=_height(list(several)))
    layout |= {
        "xaxis": {"type": "category", "automargin": True},
        "yaxis": {"title": {"text": chart.y_title}, "range": [low - room * (low < 0), high + room]},
        "barmode": "group",
        "legend": dict(_LEGEND),
        "showlegend": len(several) > 1,
    }
    return _stepped(chart, traces, frames, layout)


@plotly_figure.register
def _timeline(chart: Timeline) -> go.Figure:
    groups = list(dict.fromkeys(span.group for span in chart.spans))
    traces = []
    for number, group in enumerate(groups):
        colour = COLOURS[number % len(COLOURS)]
        own = [span for span in chart.spans if span.group == group]
        x, y = [], []
        for span in own:
            ends = [end for end in (span.start, span.middle, span.end) if end is not None]
            x += [min(ends), max(ends), None] if ends else []
            y += [_escaped(span.label), _escaped(span.label), None] if ends else []
        bars = {"type": "scatter", "x": x, "y": y, "mode": "lines", "line": {"color": colour, "width": 7}}
        traces.append(bars | {"hoverinfo": "skip", "showlegend": False, "opacity": 0.45, "legendgroup": group})
        seen = [span for span in own if span.middle is not None]
        traces.append(
            {
                "type": "scatter",
                "x": [span.middle for span in seen],
                "y": [_escaped(span.label) for span in seen],
                "customdata": [[_step(span.start), _step(span.end)] for span in seen],
                "mode": "markers",
                "name": _escaped(group),
                "legendgroup": group,
                "marker": {"color": colour, "size": 9},
                "hovertemplate": "%{y}<br>onset %{customdata[0]}, midpoint %{x:.0f}, completion %{customdata[1]}"
                "<extra></extra>",
            }
        )
    labels = list(dict.fromkeys(_escaped(span.label) for span in chart.spans))
    layout = _layout(chart, height=130 + _ROW_HEIGHT * max(3, len(labels)))
    layout |= {
        "xaxis": {"title": {"text": chart.x_title}},
        "yaxis": {"type": "category", "categoryarray": labels[::-1], "automargin": True},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    }
    layout |= _shaded(chart.bands)
    return go.Figure(data=traces, layout=layout)


def _step(value: float | None) -> str:
    return "not seen" if value is None else f"{value:.0f}"


@plotly_figure.register
def _graph(chart: Graph) -> go.Figure:
    place = {node.name: node for node in chart.nodes}
    largest = max((abs(edge.weight) for edge in chart.edges), default=1.0) or 1.0
    traces = []
    for edge in chart.edges:
        a, b = place[edge.start], place[edge.end]
        middle_x, middle_y = (a.x + b.x) / 2, (a.y + b.y) / 2
        traces.append(
            {
                "type": "scatter",
                "x": [a.x, middle_x, b.x],
                "y": [a.y, middle_y, b.y],
                "mode": "lines",
                "line": {"color": COLOURS[0], "width": max(1.0, _WIDEST_EDGE * abs(edge.weight) / largest)},
                "opacity": 0.55,
                "text": ["<br>".join(map(_escaped, edge.labels))] * 3,
                "hoverinfo": "text",
                "showlegend": False,
            }
        )
    traces.append(
        {
            "type": "scatter",
            "x": [node.x for node in chart.nodes],
            "y": [node.y for node in chart.nodes],
            "text": [_escaped(node.name) for node in chart.nodes],
            "mode": "markers+text",
            "textposition": "top center",
            "marker": {"size": 13, "color": NEUTRAL},
            "hoverinfo": "text",
            "showlegend": False,
        }
    )
    layout = _layout(chart, height=420)
    hidden = {"visible": False}
    layout |= {"xaxis": hidden | {"range": _roomy([n.x for n in chart.nodes])}, "yaxis": dict(hidden)}
    layout["yaxis"]["range"] = _roomy([node.y for node in chart.nodes])
    return go.Figure(data=traces, layout=layout)


def _roomy(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    room = 0.12 * (high - low or 1.0)
    return [low - room, high + room]


def _stepped(
    chart: Heatmap | Bars, traces: list[dict[str, Any]], frames: list[list[dict[str, Any]]], layout: dict[str, Any]
) -> go.Figure:
    """Puts the last step's numbers into the traces, and all steps' into frames that a slider chooses from."""
    shown = [trace | frame for trace, frame in zip(traces, frames[-1], strict=True)]
    if chart.steps is None:
        return go.Figure(data=shown, layout=layout)
    types = [trace["type"] for trace in traces]
    named = [
        go.Frame(name=str(step), data=[frame | {"type": kind} for frame, kind in zip(of_step, types, strict=True)])
        for step, of_step in zip(chart.steps, frames, strict=True)
    ]
    at_once = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    layout["sliders"] = [
        {
            "active": len(named) - 1,
            "currentvalue": {"prefix": "step "},
            "steps": [
                {"label": str(step), "method": "animate", "args": [[str(step)], at_once]} for step in chart.steps
            ],
        }
    ]
    return go.Figure(data=shown, layout=layout, frames=named)


def _height(names: Sequence[str]) -> int:
    """Makes room for a legend of several rows, so that the axes keep their size and the legend clears their title."""
    rows = -(-sum(len(name) + 8 for name in names) // _LEGEND_WIDTH)
    return _HEIGHT + _LEGEND_ROW * max(0, rows - 1)


def _layout(chart: Chart, *, height: int) -> dict[str, Any]:
    return {
        "title": {"text": _escaped(chart.title)},
        "height": height,
        "margin": {"l": 60, "r": 20, "t": 50, "b": 50},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
    }


def _shaded(bands: Any) -> dict[str, Any]:
    """Shades bands over the whole height, each with its label on top."""
    shapes, labels = [], []
    band: Band
    for band in bands:
        shapes.append(
            {
                "type": "rect",
                "xref": "x",
                "yref": "paper",
                "x0": band.start,
                "x1": band.end,
                "y0": 0,
                "y1": 1,
                "line": {"width": 0},
                "fillcolor": _transparent(NEUTRAL, 0.16),
                "layer": "below",
            }
        )
        labels.append(
            {
                "x": (band.start + band.end) / 2,
                "y": 1,
                "xref": "x",
                "yref": "paper",
                "text": _escaped(band.label),
                "showarrow": False,
                "yanchor": "bottom",
                "font": {"size": 11},
            }
        )
    return {"shapes": shapes, "annotations": labels}


def _escaped(text: str) -> str:
    """Writes a text as plotly shows it letter by letter: it would take tags in it for links and bold letters."""
    return html.escape(text, quote=False)


def _transparent(colour: str, share: float) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{share})"


def _plain(values: np.ndarray, places: int | None = None) -> list[Any]:
    """Turns numbers into lists with null in place of NaN.

    They are rounded to so many places, else to four significant digits.
    """
    return [_plain(one, places) if np.ndim(one) else _rounded(one, places) for one in values]


def _rounded(value: float, places: int | None) -> float | int | None:
    if not np.isfinite(value):
        return None
    rounded = round(float(value), places) if places is not None else float(f"{value:.4g}")
    return int(rounded) if rounded.is_integer() else rounded
