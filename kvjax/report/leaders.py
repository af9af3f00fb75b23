"""Writes the leading heads of a checkpoint's row, with what each kind of ablation of them costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvjax.measure.declarations.components import drop_field
from kvjax.model.components import Component
from kvjax.sweeps.settings import REPLACEMENTS

_SHOWN = 3
_MARK = "*"


def leaders_heading(row: dict[str, Any]) -> str:
    """Writes the heading of the leaders of a table's rows: what ranks them, and which numbers follow each."""
    kinds = _measured(row)
    shown = f": {' | '.join(map(ablation_in_words, kinds))}" if len(kinds) > 1 else ""
    return f"heads by {ablation_in_words(row['ranked_by'])} accuracy drop{shown}"


def leaders_cell(row: dict[str, Any]) -> str:
    """Writes a row's first heads, each with the accuracy that each kind of ablation costs."""
    return "  ".join(_leader(head, _measured(row)) for head in row["top_heads"][:_SHOWN]).rstrip()


def leaders_notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Explains the marks of the leaders of shown rows, and compares the last with the random control if measured."""
    notes = []
    if any(head["ablations_disagree"] for row in rows for head in row["top_heads"][:_SHOWN]):
        notes.append(
            f"{_MARK} two kinds of ablation disagree: their 95 % intervals are disjoint, and their drops differ by a "
            "factor of two or in sign"
        )
    leaders = rows[-1]["top_heads"][:_SHOWN]
    if leaders and leaders[0][drop_field("accuracy", "random")] is not None:
        drops = ", ".join(
            f"{_name(head)} {head['accuracy_drop_random']:.3f} ({head['accuracy_drop_random_spread']:.3f})"
            for head in leaders
        )
        notes.append(
            f"random control at step {rows[-1]['step']}: drop (and its spread over directions) from a random step the "
            f"size of the head's write, with nothing replaced: {drops}"
        )
    return notes


def ablation_in_words(kind: str) -> str:
    """Writes a kind of ablation as it stands before the word ablation."""
    return kind.replace("_", "-")


def _measured(row: dict[str, Any]) -> list[str]:
    """Lists the kinds of ablation that a row has drops of."""
    return [k for k in REPLACEMENTS if any(head[drop_field("accuracy", k)] is not None for head in row["top_heads"])]


def _leader(head: dict[str, Any], kinds: Sequence[str]) -> str:
    drops = " | ".join(f"{head[drop_field('accuracy', kind)]:.3f}" for kind in kinds)
    return f"{_name(head)} {drops}{_MARK if head['ablations_disagree'] else ' '}"


def _name(head: dict[str, Any]) -> str:
    return str(Component(head["layer"], head["head"]))
