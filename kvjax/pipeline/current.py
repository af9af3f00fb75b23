"""Whether a stage's result is there and of the inputs there are now."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Current:
    """Whether a stage has nothing left to do.

    Attributes:
      holds: whether its result is there, and of the inputs there are now.
      reason: why, in one sentence.
      command: what to run if it does not hold; None if no command helps.
    """

    holds: bool
    reason: str
    command: str | None = None


def all_current(states: Iterable[Current]) -> Current:
    """Joins the states of several runs: the first that does not hold, or the last."""
    last = Current(False, "there are no runs")
    for last in states:
        if not last.holds:
            return last
    return last
