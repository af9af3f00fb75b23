"""Tells in which order metrics moved, over seeds: shares with binomial intervals, and the order that they support."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from kvjax.measure.uncertainty import wilson_interval

Relation = Literal["before", "after", "undetermined"]


@dataclasses.dataclass(frozen=True)
class Onset:
    """When a metric moved in one run, as far as its checkpoints tell.

    Attributes:
      after: the last checkpoint before it.
      by: the first checkpoint from it on; None if it had not moved by `after`, the run's last one.
    """

    after: int
    by: int | None


@dataclasses.dataclass(frozen=True)
class Precedence:
    """How often one metric preceded another.

    Attributes:
      first, second: the metrics; `first` preceded in at least as many seeds.
      before, after: seeds in which `first` came before, and after, `second`.
      undetermined: seeds in which both moved between the same checkpoints, or neither moved.
      share: before / (before + after); None if no seed tells.
      low, high: its 95 % Wilson interval.
    """

    first: str
    second: str
    before: int
    after: int
    undetermined: int
    share: float | None
    low: float | None
    high: float | None

    @property
    def holds(self) -> bool:
        """Checks whether the interval excludes that both orders are equally frequent."""
        return self.low is not None and self.low > 0.5


def relation(a: Onset, b: Onset) -> Relation:
    """Compares two onsets of one run. They are undetermined if their intervals between checkpoints overlap."""
    if a.by is not None and a.by <= b.after:
        return "before"
    if b.by is not None and b.by <= a.after:
        return "after"
    return "undetermined"


def precedences(onsets: Mapping[str, Sequence[Onset | None]]) -> list[Precedence]:
    """Counts for each pair of metrics in how many seeds one preceded the other.

    Args:
      onsets: of each metric, one entry per seed in the same order; None for a seed without the metric.

    Returns:
      Every pair, the surest first.
    """
    found = []
    for one, other in itertools.combinations(onsets, 2):
        told = [
            relation(a, b) for a, b in zip(onsets[one], onsets[other], strict=True) if a is not None and b is not None
        ]
        before, after = told.count("before"), told.count("after")
        first, second = (one, other) if before >= after else (other, one)
        before, after = max(before, after), min(before, after)
        trials = before + after
        low, high = wilson_interval(np.array([before]), np.array([trials]))
        known = trials > 0
        found.append(
            Precedence(
                first=first,
                second=second,
                before=before,
                after=after,
                undetermined=told.count("undetermined"),
                share=before / trials if known else None,
                low=float(low[0]) if known else None,
                high=float(high[0]) if known else None,
            )
        )
    return sorted(found, key=lambda pair: (-(pair.low or 0.0), -(pair.share or 0.0)))


def consensus_order(metrics: Sequence[str], pairs: Sequence[Precedence]) -> list[list[str]] | None:
    """Arranges metrics in groups such that every precedence that holds goes from an earlier group to a later one.

    Returns:
      Groups in order; the order within a group is not known. None if the precedences contradict one another.
    """
    before = {metric: {pair.first for pair in pairs if pair.holds and pair.second == metric} for metric in metrics}
    groups: list[list[str]] = []
    placed: set[str] = set()
    while len(placed) < len(metrics):
        group = [metric for metric in metrics if metric not in placed and before[metric] <= placed]
        if not group:
            return None
        groups.append(group)
        placed |= set(group)
    return groups
