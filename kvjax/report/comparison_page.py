"""Writes a comparison of runs: the findings, then tables of what they rest on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax.compare.findings import step_interval
from kvjax.report.parts import Part, Table

MOST_NAMED = 12  # runs that get columns and rows of their own; of more, tables say what they have in common


def page(document: Mapping[str, Any]) -> str:
    """Writes the comparison as Markdown: the findings, then tables of what they rest on."""
    lines = [f"# Comparison of {len(document['runs'])} runs"]
    for part in comparison_parts(document):
        lines += part.markdown()
    return "\n".join(lines) + "\n"


def comparison_parts(document: Mapping[str, Any]) -> list[Part]:
    """Writes the findings and notes, and tables of accuracy, events, roles, leading components and phases."""
    runs = document["runs"] if len(document["runs"]) <= MOST_NAMED else []
    parts = [Part(lines=document["findings"])]
    if document["notes"]:
        parts.append(Part("Notes", document["notes"]))
    splits = list(document["accuracy"])
    best = {split: document["accuracy"][split]["best"] for split in splits}
    accuracy = [
        *(
            [one["name"], one["seed"], one["best_step"], *(best[split]["values"][one["name"]] for split in splits)]
            for one in runs
        ),
        ["median", "", "", *(best[split]["median"] for split in splits)],
        ["range", "", "", *(_ends(best[split]) for split in splits)],
    ]
    header = ["run", "seed", "step", *splits]
    parts.append(Part("Accuracy at the best checkpoint", tables=[Table("", header, accuracy)]))
    for title, family in (
        ("Births", "births"),
        ("Half-rises", "half_rises"),
        ("From which checkpoint on measures are stable", "stabilization"),
    ):
        parts.append(_events(title, document[family], runs))
    if runs:
        columns = [one["name"] for one in runs]
        at_steps = ["at steps", *(", ".join(map(str, document["roles"]["steps"][name])) for name in columns)]
        winners = [
            [role, *(f"{w['component'] or '-'} {w['score']:.2f} ({w['second_score']:.2f})" for w in own)]
            for role, own in document["roles"]["winners"].items()
        ]
        winners.append(at_steps)
    else:
        columns = ["heads, and in how many runs each has the largest score"]
        winners = [[role, _counted(own)] for role, own in document["roles"]["winners"].items()]
    evidence = {"ablation": "ablation", "interventions": "patching"}[document["roles"]["evidence"]]
    reading = (
        f"Compared at {document['roles']['stage_reason']}. "
        f"A score is attention times the share of the causal effect (by {evidence}); in brackets the next head's. "
        "Which head answers to which: `matching` in comparison.json."
    )
    table = Table("", ["role", *columns], winners)
    parts.append(Part("Heads by role", [reading], tables=[table]))
    if not runs:
        return [*parts, Part("", ["Leading components, phases and handovers of each run: comparison.json."])]
    leaders = [
        [own["run"], own["step"], leaders_in_words(own["heads"]), leaders_in_words(own["mlps"])]
        for own in document["leaders"]
    ]
    parts.append(Part("Leading components", tables=[Table("", ["run", "step", "heads", "MLPs"], leaders)]))
    parts.append(
        Part("Phases and handovers", [f"{name}: {_phases(story)}" for name, story in document["story"].items()])
    )
    return parts


def _counted(winners: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter(one["component"] or "none" for one in winners)
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def _events(title: str, events: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> Part:
    if not events:
        return Part(title, ["None in any run."])
    rows = [
        [name, *_steps_of(entry, runs), f"{entry['formed']} of {entry['total']}", _median(entry)]
        for name, entry in events.items()
    ]
    header = ["", *(one["name"] for one in runs), "formed", "median [95 %]"]
    reading = []
    if runs:
        reading.append("`>` marks a run that had not formed it by that step.")
        if any(own["unconfirmed_step"] is not None for entry in events.values() for own in entry["runs"]):
            reading[0] += " `?`: it is there from this step on, with too few further checkpoints to confirm it."
    return Part(title, reading, tables=[Table("", header, rows)])


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
        if own is None:
            cells.append("-")
            continue
        mark = ("≤" if own["left_censored"] else "") if own["formed"] else ">"
        late = "" if own["unconfirmed_step"] is None else f", {own['unconfirmed_step']}?"
        cells.append(f"{mark}{own['step']}{late}")
    return cells


def _median(entry: Mapping[str, Any]) -> str:
    return "-" if entry["median"] is None else f"{entry['median']}{step_interval(entry)}"


def _ends(spread: Mapping[str, Any]) -> str:
    return "-" if spread["low"] is None else f"{spread['low']:.3f} to {spread['high']:.3f}"
