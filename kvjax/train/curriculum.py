"""Chooses the training records that each stage of a curriculum draws from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.config.train import CURRICULUM_AXES, CurriculumStage
from kvjax.errors import unusable
from kvjax.train.trainer import batch_indices


@dataclasses.dataclass(frozen=True)
class DrawPhase:
    """A stretch of training that draws from the same records.

    Attributes:
      after: the last step before it, 0 for the first phase.
      until: its last step; None for the one that lasts to the end.
      records: indices of the records it draws from, ascending.
    """

    after: int
    until: int | None
    records: np.ndarray


def draw_phases(
    curriculum: Sequence[CurriculumStage], records: Iterable[Mapping[str, Any]], source: Path
) -> tuple[DrawPhase, ...]:
    """Finds the records of every stage; after the last stage all records are drawn from.

    Args:
      curriculum: the stages, by ascending step; none draws from all records throughout.
      records: the training split's.
      source: their file, for messages.

    Raises:
      InputError: no record fits a stage; the message has the numbers.
    """
    axes = {axis: [] for axis in CURRICULUM_AXES}
    for record in records:
        for axis, values in axes.items():
            values.append(_range_of(record, axis))
    ranges = {axis: np.array(values).reshape(-1, 2) for axis, values in axes.items()}
    count = len(ranges[CURRICULUM_AXES[0]])
    phases, after = [], 0
    for stage in curriculum:
        fits = np.ones(count, bool)
        for axis, limits in stage.limits().items():
            fits &= (ranges[axis][:, 0] >= limits.min) & (ranges[axis][:, 1] <= limits.max)
        if not fits.any():
            wanted = ", ".join(f"{axis} {limits.min} to {limits.max}" for axis, limits in stage.limits().items())
            there = ", ".join(
                f"{axis} {ranges[axis][:, 0].min()} to {ranges[axis][:, 1].max()}" for axis in stage.limits()
            )
            expected = f"records for the curriculum's stage until step {stage.until_step} ({wanted})"
            raise unusable(source, expected, f"none among {count} ({there})")
        phases.append(DrawPhase(after, stage.until_step, np.flatnonzero(fits)))
        after = stage.until_step
    return (*phases, DrawPhase(after, None, np.arange(count)))


def _range_of(record: Mapping[str, Any], axis: str) -> tuple[int, int]:
    """Finds the smallest and largest value of an axis in a record; only lags differ between a record's reads."""
    if axis != "query_lag":
        value = record["axes"][axis]
        return value, value
    lags = [read["writes_since_support"] for read in record["query_plan"]]
    return min(lags), max(lags)


def draw_batches(seed: int, first_step: int, steps: int, phases: Sequence[DrawPhase], *, batch_size: int) -> np.ndarray:
    """Draws the records each step trains on, [steps, batch_size], as `batch_indices` does in each phase.

    A phase begins its epochs anew, so that its batches depend on the seed and the step alone.
    """
    parts, step, end = [], first_step, first_step + steps
    for phase in phases:
        last = end - 1 if phase.until is None else min(end - 1, phase.until)
        if step > last:
            continue
        rows = batch_indices(
            seed, step - phase.after, last - step + 1, num_records=len(phase.records), batch_size=batch_size
        )
        parts.append(np.where(rows < 0, -1, phase.records[rows]).astype(np.int32))
        step = last + 1
    return np.concatenate(parts)
