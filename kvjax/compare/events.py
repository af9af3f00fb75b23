"""Collects what each run reached and when: births, half-rises, stability, onsets; a run that has not is censored."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvjax.artifacts.birth_windows_schema import BirthEntry, OrderEntry
from kvjax.compare.aligned import SweptRun
from kvjax.compare.order import Onset
from kvjax.compare.survival import Observation, kaplan_meier


@dataclasses.dataclass(frozen=True)
class Reached:
    """When one run reached something.

    Attributes:
      run: its name.
      step: the checkpoint at which it has, or the last one at which it had not.
      formed: whether it has.
      left_censored: whether the first measured checkpoint is past it already.
      unconfirmed_step: the checkpoint from which on it seems to have, with too few further ones to confirm it.
    """

    run: str
    step: int
    formed: bool
    left_censored: bool = False
    unconfirmed_step: int | None = None


def births(runs: Sequence[SweptRun]) -> dict[str, dict[str, Any]]:
    """Summarises the births of every metric that has a threshold in some run, ready for `EventEntry`."""
    found: dict[str, list[Reached]] = {}
    about: dict[str, dict[str, Any]] = {}
    for one, name, entry in _birth_entries(runs):
        if entry.threshold is None:
            continue
        about.setdefault(name, {"split": entry.split, "threshold": entry.threshold})
        found.setdefault(name, []).append(_birth_of(one, entry))
    return {name: event_entry(own, **about[name]) for name, own in found.items()}


def _birth_of(one: SweptRun, entry: BirthEntry) -> Reached:
    """Takes when a run's metric was born; one that is not confirmed is censored at the checkpoint before it."""
    if entry.step is not None:
        return Reached(one.name, entry.step, True, entry.left_censored)
    if entry.unconfirmed_step is None:
        return Reached(one.name, one.steps[-1], False)
    before = [step for step in one.steps if step < entry.unconfirmed_step]
    return Reached(one.name, max(before, default=0), False, unconfirmed_step=entry.unconfirmed_step)


def half_rises(runs: Sequence[SweptRun]) -> dict[str, dict[str, Any]]:
    """Summarises when every metric was halfway to its plateau; a run whose rise is too small has not risen."""
    found: dict[str, list[Reached]] = {}
    splits: dict[str, str] = {}
    for one, name, entry in _birth_entries(runs):
        splits.setdefault(name, entry.split)
        rose = entry.half_rise_step is not None
        found.setdefault(name, []).append(Reached(one.name, entry.half_rise_step if rose else one.steps[-1], rose))
    risen = {name: own for name, own in found.items() if any(reached.formed for reached in own)}
    return {name: event_entry(own, split=splits[name], threshold=None) for name, own in risen.items()}


def stabilization(runs: Sequence[SweptRun]) -> dict[str, dict[str, Any]]:
    """Summarises from which checkpoint on each family of measures is stable; leaves out what no run can tell."""
    found: dict[str, list[Reached]] = {}
    for one in runs:
        rows = one.results.rows
        for family in rows[-1]["stabilized"]:
            states = [(row["step"], row["stabilized"][family]) for row in rows]
            if all(state is None for _, state in states):
                continue  # unfinished: nothing is known
            stable = next((step for step, state in states if state), None)
            step = one.steps[-1] if stable is None else stable
            found.setdefault(family, []).append(Reached(one.name, step, stable is not None))
    return {family: event_entry(own, split=None, threshold=None) for family, own in found.items()}


def onsets(runs: Sequence[SweptRun]) -> dict[str, list[Onset | None]]:
    """Finds when each metric first moved in each run, between two of its checkpoints.

    Components of runs are not the same ones, so that only their kind counts, such as `head_accuracy_drop`: the first
    component that moved, rises and falls apart. A metric that moved in some run and not in another is censored there.
    """
    first = [_first_movements(one) for one in runs]
    metrics = dict.fromkeys(name for own in first for name in own)
    return {
        name: [own.get(name, Onset(one.steps[-1], None)) for one, own in zip(runs, first, strict=True)]
        for name in metrics
    }


def event_entry(own: Sequence[Reached], *, split: str | None, threshold: float | None) -> dict[str, Any]:
    """Estimates the survival curve of what some runs reached, ready for `EventEntry`."""
    curve = kaplan_meier([Observation(one.step, one.formed) for one in own])
    points = zip(curve.steps, curve.shares, curve.low, curve.high, strict=True)
    return {
        "split": split,
        "threshold": threshold,
        "formed": curve.formed,
        "total": curve.total,
        "median": curve.median,
        "median_low": curve.median_low,
        "median_high": curve.median_high,
        "curve": [dict(zip(("step", "share", "low", "high"), point, strict=True)) for point in points],
        "runs": [dataclasses.asdict(one) for one in own],
    }


def _birth_entries(runs: Sequence[SweptRun]) -> Iterator[tuple[SweptRun, str, BirthEntry]]:
    for one in runs:
        for name, entry in one.results.windows.births.items():
            yield one, name, entry


def _first_movements(one: SweptRun) -> Mapping[str, Onset]:
    found: dict[str, Onset] = {}
    for window in one.results.windows.windows:
        for entry in window.order:
            onset, kind = _observed(entry), _kind(entry)
            if onset is not None and (kind not in found or onset.by < found[kind].by):
                found[kind] = onset
    return found


def _kind(entry: OrderEntry) -> str:
    """Names what moved, without the component; a fall is another event than a rise."""
    kind = entry.metric.partition(".")[0]
    return kind if entry.direction == "rise" else f"fall of {kind}"


def _observed(entry: OrderEntry) -> Onset | None:
    """Takes the checkpoints between which a metric's midpoint lies; None if it is unknown."""
    return None if entry.between is None else Onset(*entry.between)
