"""What pages are made of, in Markdown and HTML alike: sections of parts, with sentences, charts and tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from kvjax.errors import InputError
from kvjax.report.charts.description import Chart


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; floats get three digits, None a dash."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def cells(self) -> list[list[str]]:
        """Writes every cell as text."""
        return [[_cell(value) for value in row] for row in self.rows]

    def markdown(self) -> list[str]:
        """Writes the table in Markdown, a line each."""
        rows = [list(map(str, self.header)), ["---"] * len(self.header), *self.cells()]
        return ["| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in rows]


@dataclasses.dataclass(frozen=True)
class Part:
    """A titled part of a section: sentences, charts beside one another, tables under them.

    Attributes:
      title: of the part; empty for none.
      lines: sentences, each of which stands alone.
      charts: of the part.
      tables: of the part.
      listing: lines of a printed table, shown as they are.
      folded: whether it is opened only when a reader asks for it.
    """

    title: str = ""
    lines: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    listing: Sequence[str] = ()
    folded: bool = False

    def markdown(self) -> list[str]:
        """Writes sentences and tables in Markdown, a line each; charts are files of their own."""
        lines = ["", f"## {self.title}", ""] if self.title else [""]
        lines += [f"- {line}" for line in self.lines]
        for table in self.tables:
            gap = [""] if lines[-1] else []
            lines += [*gap, *([table.title, ""] if table.title else []), *table.markdown()]
        return lines


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of a report.

    Attributes:
      name: of its anchor.
      title: its heading.
      lead: what it answers, in a sentence.
      parts: in the order in which they are read.
      missing: why it has no results, with the command that makes them; None if it has.
    """

    name: str
    title: str
    lead: str
    parts: Sequence[Part] = ()
    missing: str | None = None

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that its slider chooses from: those of its stepped charts, ascending."""
        charts = [chart for part in self.parts for chart in part.charts]
        return tuple(sorted({int(step) for chart in charts for step in getattr(chart, "steps", None) or ()}))


def section(name: str, title: str, lead: str, parts: Callable[[], Sequence[Part]]) -> Section:
    """Builds a section, or says what is missing if its results cannot be opened."""
    try:
        return Section(name, title, lead, tuple(parts()))
    except InputError as error:
        return Section(name, title, lead, missing=str(error))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
