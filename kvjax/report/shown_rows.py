"""Picks the rows of a long table at which things change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvjax.measure.declarations.components import drop_field

# A row that lies this close to the line between its shown neighbours, in accuracy, adds nothing.
_SMALLEST_CHANGE = 0.01


def rows_of_change(rows: Sequence[Mapping[str, Any]], *, most: int) -> list[int]:
    """Picks the rows from which all others can be guessed best: the first, the last, and those where a course bends.

    One row is added after another: the one furthest from the straight line, over steps, between those already picked.
    Courses are the accuracy, the held-out accuracy, and the drop of every head that leads somewhere. So both sides of a
    jump are shown, and a plateau or a ramp by its ends.

    Args:
      rows: of a sweep's checkpoints, in step order.
      most: largest number of rows to pick; all are if there are no more.

    Returns:
      Their indices, ascending.
    """
    if len(rows) <= most:
        return list(range(len(rows)))
    steps, courses_RxM = _courses(rows)
    shown = [0, len(rows) - 1]
    while len(shown) < most:
        guessed = np.stack([np.interp(steps, steps[shown], course[shown]) for course in courses_RxM.T], axis=1)
        off_R = np.abs(courses_RxM - guessed).max(axis=1)
        furthest = int(np.argmax(off_R))
        if off_R[furthest] < _SMALLEST_CHANGE:
            break
        shown = sorted([*shown, furthest])
    return shown


def _courses(rows: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Collects the steps, and the numbers whose changes count, [rows, courses]; 0 if a row has none.

    It goes over the rows once: those of a long run lie in a file, and parsing them takes time.
    """
    steps, accuracies, drops = [], [], []
    for row in rows:
        steps.append(row["step"])
        accuracies.append([row["answer_accuracy"], row["heldout_answer_accuracy"]])
        drops.append({(head["layer"], head["head"]): _drop(row, head) for head in row["top_heads"]})
    leading = sorted({next(iter(of_row)) for of_row in drops if of_row})
    numbers = [[*own, *(of_row.get(head) for head in leading)] for own, of_row in zip(accuracies, drops, strict=True)]
    return np.array(steps, float), np.nan_to_num(np.array(numbers, float))


def _drop(row: Mapping[str, Any], head: Mapping[str, Any]) -> float | None:
    return head[drop_field("accuracy", row["ranked_by"])]
