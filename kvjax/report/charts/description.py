"""Describes charts as data, so that two libraries draw the same: plotly for pages, matplotlib for papers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from matplotlib.figure import Figure

# Colours that stay apart for colour-blind readers (Okabe and Ito); yellow is left out, for white paper hides it.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
NEUTRAL = "#808080"
SPLIT_COLOURS = {
    "validation_iid": "#0072B2",
    "heldout_pairs": "#D55E00",
    "structural_ood": "#009E73",
    "counterfactual": "#CC79A7",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Band:
    """A stretch of training steps that is shaded, such as a birth window, with its label."""

    start: float
    end: float
    label: str


@dataclasses.dataclass(frozen=True, eq=False)
class Line:
    """One line of a chart.

    Attributes:
      name: in the legend; an empty name keeps the line out of it.
      x, y: [N]; NaN breaks the line.
      low, high: ends of a 95 % interval or of a range, [N]; None if there are none.
      colour: of line and band.
      dashed: whether it is a null or another reference rather than a measurement.
      faint: whether it stands behind the others, as single runs behind their median.
      stepped: whether it keeps its level until the next point.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    colour: str = COLOURS[0]
    dashed: bool = False
    faint: bool = False
    stepped: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Chart:
    """What every chart has.

    Attributes:
      name: of its files and its place on a page.
      title: one line.
      caption: what it shows and how to read it, in a sentence or two.
    """

    name: str
    title: str
    caption: str

    def plotly(self) -> go.Figure:
        """Draws the chart with plotly."""
        from kvjax.report.charts.plotly_charts import plotly_figure

        return plotly_figure(self)

    def matplotlib(self) -> Figure:
        """Draws the chart with matplotlib."""
        from kvjax.report.charts.matplotlib_charts import matplotlib_figure

        return matplotlib_figure(self)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LineChart(Chart):
    """Lines over training steps, or over another number.

    Attributes:
      lines: at least one.
      bands: shaded stretches of x.
      y_range: ends of the y axis; None for those of the data.
    """

    lines: Sequence[Line]
    y_title: str
    x_title: str = "training step"
    bands: Sequence[Band] = ()
    y_range: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Heatmap(Chart):
    """A map of numbers, or one at each of several steps.

    Attributes:
      x, y: labels of columns and rows, the first row on top.
      values: [Y, X], or [S, Y, X] with `steps`; NaN leaves a cell empty.
      steps: training steps of the maps; None for a single one.
      marks: cells that a dot marks, shaped as `values`; None for none. The caption says what a dot means.
      scale: `share` from 0 to 1, `size` from 0 to the largest value, `signed` about 0.
      limit: the largest value of the scale, in place of the data's.
      unit: what the colour means.
    """

    x: Sequence[str]
    y: Sequence[str]
    values: np.ndarray
    x_title: str
    y_title: str
    unit: str
    steps: Sequence[int] | None = None
    marks: np.ndarray | None = None
    scale: Literal["share", "size", "signed"] = "size"
    limit: float | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of the colour scale: those of all steps, so that colours mean the same at each."""
        if self.scale == "share":
            return 0.0, 1.0
        finite = np.abs(self.values[np.isfinite(self.values)])
        high = self.limit or float(finite.max(initial=0.0)) or 1.0
        return (-high, high) if self.scale == "signed" else (0.0, high)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Bars(Chart):
    """Bars side by side, or at each of several steps.

    Attributes:
      labels: of the groups of bars, [N].
      series: name -> heights [N], or [S, N] with `steps`.
      steps: training steps; None for a single chart.
    """

    labels: Sequence[str]
    series: dict[str, np.ndarray]
    y_title: str
    steps: Sequence[int] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Span:
    """A row of a timeline: something that began, was halfway and ended. A moment that was not seen is None."""

    label: str
    start: float | None
    middle: float | None
    end: float | None
    group: str


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Timeline(Chart):
    """What moved when: a bar from onset to completion for each row, with its midpoint; a colour for each group."""

    spans: Sequence[Span]
    bands: Sequence[Band] = ()
    x_title: str = "training step"


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A node of a graph, at a place of its own."""

    name: str
    x: float
    y: float


@dataclasses.dataclass(frozen=True, eq=False)
class Edge:
    """An edge of a graph, as wide as its `weight` is of the largest one; `labels` are shown on hover, a line each."""

    start: str
    end: str
    weight: float
    labels: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Graph(Chart):
    """A graph of components, with edges as wide as their effect."""

    nodes: Sequence[Node]
    edges: Sequence[Edge]
