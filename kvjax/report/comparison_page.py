"""Writes a comparison of runs as a page of Markdown: the findings, then tables of what they rest on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvjax.compare.findings import step_interval
from kvjax.report.markdown import table


def page(document: Mapping[str, Any]) -> str:
    """Writes the comparison as Markdown: the findings, then tables of what they rest on."""
    runs = document["runs"]
    lines = [f"# Comparison of {len(runs)} runs", ""]
    lines += [f"- {sentence}" for sentence in document["findings"]]
    if document["notes"]:
        lines += ["", "Notes:", "", *(f"- {note}" for note in document["notes"])]
    lines += ["", "## Accuracy at the best checkpoint", ""]
    splits = list(document["accuracy"])
    best = {split: document["accuracy"][split]["best"] for split in splits}
    lines += table(
        ["run", "seed", "step", *splits],
        [
            [one["name"], one["seed"], one["best_step"], *(best[split]["values"][one["name"]] for split in splits)]
            for one in runs
        ]
        + [["median", "", "", *(best[split]["median"] for split in splits)]]
        + [["range", "", "", *(_ends(best[split]) for split in splits)]],
    )
    for title, family in (
        ("Births", "births"),
        ("Half-rises", "half_rises"),
        ("From which checkpoint on measures are stable", "stabilization"),
    ):
        lines += ["", f"## {title}", ""]
        if not document[family]:
            lines += ["None in any run."]
            continue
        lines += ["`>` marks a run that had not formed it by that step.", ""]
        lines += table(
            ["", *(one["name"] for one in runs), "formed", "median [95 %]"],
            [
                [name, *_steps_of(entry, runs), f"{entry['formed']} of {entry['total']}", _median(entry)]
                for name, entry in document[family].items()
            ],
        )
    lines += ["", "## Heads by role", ""]
    lines += table(
        ["role", *(one["name"] for one in runs)],
        [
            [role, *(f"{w['component'] or '-'} {w['score']:.2f} ({w['second_score']:.2f})" for w in winners)]
            for role, winners in document["roles"]["winners"].items()
        ],
    )
    evidence = {"ablation": "ablation", "interventions": "patching"}[document["roles"]["evidence"]]
    lines += ["", f"A score is attention times the share of the causal effect (by {evidence}); in brackets the next"]
    lines += ["head's. Which head answers to which: `matching` in comparison.json.", "", "## Leading components", ""]
    lines += table(
        ["run", "step", "heads", "MLPs"],
        [
            [own["run"], own["step"], leaders_in_words(own["heads"]), leaders_in_words(own["mlps"])]
            for own in document["leaders"]
        ],
    )
    lines += ["", "## Phases and handovers", ""]
    for name, story in document["story"].items():
        lines += [f"- {name}: {_phases(story)}"]
    return "\n".join(lines) + "\n"


def _phases(story: Mapping[str, Any]) -> str:
    phases = [
        f"steps {p['between'][0]} to {p['between'][1]} ({', '.join(_carriers(p)) or 'no carrier'})"
        for p in story["phases"]
    ]
    handed = [
        f"{', '.join(one['from'])} to {', '.join(one['to'])} between {one['between'][0]} and {one['between'][1]}"
        for one in story["handovers"]
    ]
    return f"{'; '.join(phases) or 'no phase'}. Handovers: {'; '.join(handed) or 'none'}."


def _carriers(phase: Mapping[str, Any]) -> list[str]:
    return [one if isinstance(one, str) else one["component"] for one in phase["carriers"]]


def leaders_in_words(own: Sequence[Mapping[str, Any]]) -> str:
    """Writes the first three leading components with the accuracy that ablating each costs."""
    return ", ".join(
        f"{one['component']} {one['accuracy_drop']:.3f}" for one in own[:3] if one["accuracy_drop"] is not None
    )


def _steps_of(entry: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    by_run = {own["run"]: own for own in entry["runs"]}
    cells = []
    for one in runs:
        own = by_run.get(one["name"])
        mark = "" if own is None or own["formed"] else ">"
        cells.append("-" if own is None else f"{mark}{'≤' if own['left_censored'] else ''}{own['step']}")
    return cells


def _median(entry: Mapping[str, Any]) -> str:
    return "-" if entry["median"] is None else f"{entry['median']}{step_interval(entry)}"


def _ends(spread: Mapping[str, Any]) -> str:
    return "-" if spread["low"] is None else f"{spread['low']:.3f} to {spread['high']:.3f}"
