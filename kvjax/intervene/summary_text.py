"""Pieces of the lines that summarise an intervention, as all kinds write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def cell(value: float | None, form: str) -> str:
    """Formats a number, or a dash of the same width if there is none."""
    return format(value, form) if value is not None else "-".rjust(int(form.partition(".")[0] or 1))


def interval(numbers: Mapping[str, float | None]) -> str:
    """Formats an estimate with its 95 % interval: `0.51 [0.41, 0.61]`."""
    return f"{cell(numbers['estimate'], '6.2f')} [{cell(numbers['low'], '.2f')}, {cell(numbers['high'], '.2f')}]"


def center_step(document: Mapping[str, Any]) -> int:
    """Finds the step that a summary is printed for: the window's center, or the last of the named steps."""
    return document["window"].get("center_step", document["steps"][-1])


def largest_by_pair_kind(
    document: Mapping[str, Any], effects: Sequence[Mapping[str, Any]], name: Callable[[Mapping[str, Any]], str]
) -> list[str]:
    """Writes a line per kind of pair: the three largest recoveries at the center, denoising."""
    lines = []
    for kind in document["pairs"]["counts"]:
        own = [e for e in effects if (e["pair_kind"], e["step"]) == (kind, center_step(document))]
        own = [e for e in own if e.get("direction", "denoising") == "denoising"][:3]
        shown = "; ".join(f"{name(e)} {interval(e['recovery'])}" for e in own) or "no gap between the runs to recover"
        lines.append(f"{kind:<6} {shown}")
    return lines
