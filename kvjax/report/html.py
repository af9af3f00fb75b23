"""Renders a report as one HTML file that needs nothing else: styles, scripts, charts and numbers are all in it."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import markupsafe
import numpy as np
from plotly.offline import get_plotlyjs

from kvjax import __version__
from kvjax.report.charts.description import Chart
from kvjax.report.parts import Section

_TEMPLATES = "kvjax.report"


@dataclasses.dataclass(frozen=True)
class RunPage:
    """The part of a report that is about one run.

    Attributes:
      anchor: of its place on the page.
      title: its name and seed.
      headline: (label, number) pairs at its top.
      sections: in the order in which they are read.
    """

    anchor: str
    title: str
    headline: Sequence[tuple[str, str]]
    sections: Sequence[Section]


@dataclasses.dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
      title, subtitle: on top.
      made_from: the digest of everything it was made from; equal ones give equal pages.
      sections: about all runs together.
      runs: a part for each run.
      notes: what a reader must know before anything else.
    """

    title: str
    subtitle: str
    made_from: str
    sections: Sequence[Section]
    runs: Sequence[RunPage]
    notes: Sequence[str] = ()

    def charts(self) -> dict[str, Chart]:
        """Lists all charts by a name that is unique on the page, as names of files."""
        parts = [("", own) for own in self.sections]
        several = len(self.runs) > 1
        parts += [(f"{run.anchor}_" if several else "", own) for run in self.runs for own in run.sections]
        return {
            f"{prefix}{own.name}_{chart.name}": chart
            for prefix, own in parts
            for part in own.parts
            for chart in part.charts
        }


def render(page: Page) -> str:
    """Renders the page; whatever comes from input is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=False, keep_trailing_newline=True
    )
    environment.filters["words"] = _words
    template = environment.from_string(_asset("report.html.jinja"))
    return template.render(
        page=page,
        drawn=functools.lru_cache(maxsize=None)(_Drawn.of),
        css=_asset("report.css"),
        script=_asset("report.js"),
        plotly=get_plotlyjs(),
        version=__version__,
    )


def _words(text: str) -> markupsafe.Markup:
    """Escapes a sentence, and shows what stands between backticks as code."""
    pieces = str(text).split("`")
    if len(pieces) % 2 == 0:  # a single backtick is a character like any other
        return markupsafe.escape(text)
    shown = [
        markupsafe.Markup("<code>{}</code>").format(one) if at % 2 else markupsafe.escape(one)
        for at, one in enumerate(pieces)
    ]
    return markupsafe.Markup("").join(shown)


def _asset(name: str) -> str:
    return (importlib.resources.files(_TEMPLATES) / "templates" / name).read_text(encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """A chart as plotly's JSON, safe inside a script element, and its height in pixels."""

    json: str
    height: int

    @classmethod
    def of(cls, chart: Chart) -> _Drawn:
        figure = chart.plotly().to_plotly_json()
        layout = {name: value for name, value in figure["layout"].items() if name != "template"}
        content = {"data": figure["data"], "layout": layout, "frames": _frames(figure)}
        text = json.dumps(content, allow_nan=False, separators=(",", ":"), default=_plain, sort_keys=True)
        return cls(
            text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"), layout["height"]
        )


def _frames(figure: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"name": frame["name"], "data": frame["data"]} for frame in figure.get("frames", ())]


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.to_plotly_json()
