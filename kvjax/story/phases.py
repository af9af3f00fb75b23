"""Joins windows into phases (docs/definitions.md, "Phases and handovers")."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvjax.artifacts.birth_windows_schema import TriggerEntry
from kvjax.artifacts.story_schema import Moved
from kvjax.measure.registry import ALL_SPLITS
from kvjax.story.handovers import Span
from kvjax.story.shares import Shares

# Two windows agree if the carriers at their ends have this much of all carriers in common.
_IN_COMMON = 0.5


def cluster_windows(windows: Sequence[Span], shares: Shares) -> list[list[Span]]:
    """Joins windows that follow each other if their spans touch and the same components carry at their ends.

    Args:
      windows: of a run, in order.
      shares: of the heads.
    """
    clusters: list[list[Span]] = []
    for window in windows:
        before = clusters[-1][-1] if clusters else None
        if before is not None and window.first <= before.last and _agree(before, window, shares):
            clusters[-1].append(window)
        else:
            clusters.append([window])
    return clusters


def _agree(earlier: Span, later: Span, shares: Shares) -> bool:
    one, other = (set(shares.carriers(window.last)) for window in (earlier, later))
    return one == other or len(one & other) >= _IN_COMMON * len(one | other)


def largest_shifts(triggers: Iterable[TriggerEntry], *, rises: bool) -> list[Moved]:
    """Picks the strongest rise, or fall, of each measure of behaviour among triggers, the highest score first.

    Those of single components are left out, for a phase tells of them by their drops, and so are those of weights.
    """
    strongest: dict[str, TriggerEntry] = {}
    for trigger in triggers:
        if (trigger.size > 0) != rises or "." in trigger.metric or trigger.split == ALL_SPLITS:
            continue
        if trigger.metric not in strongest or trigger.score > strongest[trigger.metric].score:
            strongest[trigger.metric] = trigger
    ordered = sorted(strongest.values(), key=lambda trigger: (-trigger.score, trigger.metric))
    return [Moved(metric=t.metric, split=t.split, step=t.step, size=t.size, score=t.score) for t in ordered]
