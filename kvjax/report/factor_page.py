"""Writes the comparison of a factor's settings as a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvjax.config.factors import overrides_in_words
from kvjax.report.comparison_page import leaders_in_words
from kvjax.report.markdown import table


def factor_page(document: Mapping[str, Any]) -> str:
    """Writes the findings, then tables of what they rest on."""
    settings = document["settings"]
    labels = [entry["label"] for entry in settings]
    lines = [f"# {document['factor']}: {', '.join(labels)}", ""]
    lines += [f"- {sentence}" for sentence in document["findings"]]
    if document["notes"]:
        lines += ["", "Notes:", "", *(f"- {note}" for note in document["notes"])]
    lines += ["", "## Settings", ""]
    lines += table(
        ["setting", "differs from the base in", "seeds", "comparison of its seeds"],
        [
            [one["label"], overrides_in_words(one["overrides"]), len(one["runs"]), one["seeds"] or "-"]
            for one in settings
        ],
    )
    lines += ["", "## Summaries", ""]
    lines += ["Medians over seeds; in brackets each seed. The share is that of settings in the variance.", ""]
    lines += table(
        ["", *labels, "share of settings [95 %]"],
        [
            [name, *(_values(entry["values"][label], entry["unit"]) for label in labels), _share(entry["shares"])]
            for name, entry in document["summaries"].items()
        ],
    )
    lines += ["", "## Candidates at the best checkpoint", ""]
    lines += table(
        ["setting", "run", "step", "heads", "MLPs"],
        [
            [entry["label"], own["run"], own["step"], leaders_in_words(own["heads"]), leaders_in_words(own["mlps"])]
            for entry in settings
            for own in entry["candidates"]
        ],
    )
    lines += ["", "## Stability across seeds", ""]
    lines += table(
        ["setting", "similarity of matched roles", "by chance", "share at the same address", "by chance"],
        [[one["label"], *_stability(one["role_stability"]), *_stability(one["address_stability"])] for one in settings],
    )
    return "\n".join(lines) + "\n"


def _values(own: Mapping[str, float | None], unit: str) -> str:
    known = sorted(value for value in own.values() if value is not None)
    if not known:
        return f"none of {len(own)}"
    middle = (known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2
    form = ".0f" if unit == "steps" else ".3f"
    each = ", ".join("-" if value is None else format(value, form) for value in own.values())
    return f"{middle:{form}} ({each})"


def _share(shares: Mapping[str, Any] | None) -> str:
    if shares is None or shares["share"] is None:
        return "-"
    limits = "" if shares["low"] is None else f" [{shares['low']:.2f}, {shares['high']:.2f}]"
    return f"{shares['share']:.2f}{limits}"


def _stability(entry: Mapping[str, Any] | None) -> tuple[str, str]:
    if entry is None or entry["mean"] is None:
        return "-", "-"
    return f"{entry['mean']:.2f}", f"{entry['null']['mean']:.2f} (p = {entry['null']['probability']:.3f})"
