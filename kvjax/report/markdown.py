"""Writes tables of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Writes a table, a line each; floats get three digits, None a dash."""

    def cells(values: Sequence[Any]) -> str:
        return "| " + " | ".join(map(_cell, values)) + " |"

    return [cells(header), cells(["---"] * len(header)), *map(cells, rows)]


def _cell(value: Any) -> str:
    text = "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
