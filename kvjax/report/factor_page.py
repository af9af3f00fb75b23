"""Writes the comparison of a factor's settings: the findings, then tables of what they rest on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvjax.config.factors import overrides_in_words
from kvjax.report.comparison_page import leaders_in_words
from kvjax.report.parts import Part, Table


def factor_page(document: Mapping[str, Any]) -> str:
    """Writes the comparison as Markdown."""
    lines = [f"# {factor_title(document)}"]
    for part in factor_parts(document):
        lines += part.markdown()
    return "\n".join(lines) + "\n"


def factor_title(document: Mapping[str, Any]) -> str:
    """Names the factor and its values, the base's first."""
    return f"{document['factor']}: {', '.join(entry['label'] for entry in document['settings'])}"


def factor_parts(document: Mapping[str, Any]) -> list[Part]:
    """Writes the findings and notes, and tables of settings, summaries, candidates and stability."""
    settings = document["settings"]
    labels = [entry["label"] for entry in settings]
    parts = [Part(lines=document["findings"])]
    if document["notes"]:
        parts.append(Part("Notes", document["notes"]))
    differing = [
        [one["label"], overrides_in_words(one["overrides"]), len(one["runs"]), one["seeds"] or "-"] for one in settings
    ]
    header = ["setting", "differs from the base in", "seeds", "comparison of its seeds"]
    parts.append(Part("Settings", tables=[Table("", header, differing)]))
    summaries = [
        [name, *(_values(entry, label) for label in labels), _share(entry["shares"])]
        for name, entry in document["summaries"].items()
    ]
    reading = (
        "Medians over seeds, of births and half-rises by their survival curves; in brackets each seed. The share is "
        "that of settings in the variance; there is none of births that some runs lack."
    )
    table = Table("", ["", *labels, "share of settings [95 %]"], summaries)
    parts.append(Part("Summaries", [reading], tables=[table]))
    candidates = [
        [entry["label"], own["run"], own["step"], leaders_in_words(own["heads"]), leaders_in_words(own["mlps"])]
        for entry in settings
        for own in entry["candidates"]
    ]
    header = ["setting", "run", "step", "heads", "MLPs"]
    parts.append(Part("Candidates at the best checkpoint", tables=[Table("", header, candidates)]))
    stable = [
        [one["label"], *_stability(one["role_stability"]), *_stability(one["address_stability"])] for one in settings
    ]
    header = ["setting", "similarity of matched roles", "by chance", "share at the same address", "by chance"]
    parts.append(Part("Stability across seeds", tables=[Table("", header, stable)]))
    return parts


def _values(entry: Mapping[str, Any], label: str) -> str:
    own, median = entry["values"][label], entry["medians"].get(label)
    if all(value is None for value in own.values()):
        return f"none of {len(own)}"
    form = ".0f" if entry["unit"] == "steps" else ".3f"
    each = ", ".join("-" if value is None else format(value, form) for value in own.values())
    return f"{'-' if median is None else format(median, form)} ({each})"


def _share(shares: Mapping[str, Any] | None) -> str:
    if shares is None or shares["share"] is None:
        return "-"
    limits = "" if shares["low"] is None else f" [{shares['low']:.2f}, {shares['high']:.2f}]"
    return f"{shares['share']:.2f}{limits}"


def _stability(entry: Mapping[str, Any] | None) -> tuple[str, str]:
    if entry is None or entry["mean"] is None:
        return "-", "-"
    return f"{entry['mean']:.2f}", f"{entry['null']['mean']:.2f} (p = {entry['null']['probability']:.3f})"
