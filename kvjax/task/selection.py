"""Chooses a probe set's records to cover a split's axes, counts them, and tags them by difficulty."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from kvjax.task.stream import EVENT_AXES, SEQUENCE_AXES, Record

COVERED_AXES = ("active_keys", *EVENT_AXES)
EVENTS_PER_VALUE = 8

DIFFICULTY_RULE = (
    "Within each split, examples are ordered by the mean tokens_since_support of their reads, then by the largest, "
    "then by sample_id; the upper half is hard, the rest easy."
)

Difficulty = Literal["easy", "hard"]


def choose_examples(pool: Sequence[Record], count: int, *, seed: str) -> list[Record]:
    """Chooses `count` records that cover a split: round-robin over axis signatures, then topped up.

    After the round-robin, records are added until every value of `COVERED_AXES` in the pool has at least
    `EVENTS_PER_VALUE` read events, or all that exist. Then the last round-robin picks that coverage can spare are
    removed. More than `count` records remain only if coverage needs them.
    """
    rng = random.Random(seed)
    groups: dict[tuple[int, ...], list[Record]] = {}
    for record in pool:
        groups.setdefault(tuple(record["axes"][axis] for axis in SEQUENCE_AXES), []).append(record)
    queues = [rng.sample(groups[signature], len(groups[signature])) for signature in sorted(groups)]
    order = [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]

    available = Counter(label for record in pool for label in _event_labels(record))
    required = {label: min(EVENTS_PER_VALUE, total) for label, total in available.items()}
    chosen = order[:count]
    have = Counter(label for record in chosen for label in _event_labels(record))
    reserve = order[count:]
    while deficit := {label: need - have[label] for label, need in required.items() if have[label] < need}:
        # One that serves the most of what is missing; the earliest in the round-robin among equals.
        best = max(
            range(len(reserve)),
            key=lambda i: (sum(label in deficit for label in _event_labels(reserve[i])), -i),
        )
        have.update(_event_labels(reserve[best]))
        chosen.append(reserve.pop(best))

    for index in reversed(range(count)):
        if len(chosen) == count:
            break
        labels = Counter(_event_labels(chosen[index]))
        if all(have[label] - labels[label] >= required[label] for label in labels):
            have.subtract(labels)
            del chosen[index]
    return chosen


def assign_difficulty(records: Sequence[Record]) -> dict[str, Difficulty]:
    """Tags each record, by sample_id, easy or hard by `DIFFICULTY_RULE`."""
    by_split: dict[str, list[Record]] = {}
    for record in records:
        by_split.setdefault(record["split"], []).append(record)

    def distance(record: Record) -> tuple[float, int, str]:
        distances = [event["tokens_since_support"] for event in record["query_events"]]
        return sum(distances) / len(distances), max(distances), record["sample_id"]

    tags: dict[str, Difficulty] = {}
    for members in by_split.values():
        ordered = sorted(members, key=distance)
        for rank, record in enumerate(ordered):
            tags[record["sample_id"]] = "hard" if rank >= (len(ordered) + 1) // 2 else "easy"
    return tags


def coverage_counts(records: Sequence[Record]) -> dict[str, dict[str, dict[str, int]]]:
    """Counts read events by split, axis and value, for every axis a slice can be taken on."""
    counts: dict[str, dict[str, Counter[int]]] = {}
    for record in records:
        axes = counts.setdefault(record["split"], {axis: Counter() for axis in (*SEQUENCE_AXES, *EVENT_AXES)})
        for event in record["query_events"]:
            for axis in SEQUENCE_AXES:
                axes[axis][record["axes"][axis]] += 1
            for axis in EVENT_AXES:
                axes[axis][event[axis]] += 1
    return {
        split: {axis: {str(value): counter[value] for value in sorted(counter)} for axis, counter in axes.items()}
        for split, axes in counts.items()
    }


def _event_labels(record: Record) -> list[tuple[str, int]]:
    return [
        (axis, record["axes"][axis] if axis == "active_keys" else event[axis])
        for event in record["query_events"]
        for axis in COVERED_AXES
    ]
