"""Collects what each run reached and when: births, half-rises, stability, onsets; a run that has not is censored."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvjax.artifacts.birth_windows_schema import BirthEntry
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
    """Summarises the births of every metric that has a threshold in some run, ready for `EventEntry`.

    Metrics whose births are at other thresholds in other runs are left out: `unlike_births` names them.
    """
    found: dict[str, list[Reached]] = {}
    about: dict[str, dict[str, Any]] = {}
    unlike = unlike_births(runs)
    for one, name, entry in _birth_entries(runs):
        if entry.threshold is None or name in unlike:
            continue
        about.setdefault(name, {"split": entry.split, "threshold": entry.threshold})
        found.setdefault(name, []).append(_birth_of(one, entry))
    return {name: event_entry(own, **about[name]) for name, own in found.items()}


def unlike_births(runs: Sequence[SweptRun]) -> dict[str, list[str]]:
    """Finds the metrics whose births mean another thing in other runs: each threshold and split, in words."""
    meant: dict[str, dict[str, None]] = {}
    for _, name, entry in _birth_entries(runs):
        if entry.threshold is not None:
            meant.setdefault(name, {})[f"{entry.threshold:g} on {entry.split}"] = None
    return {name: list(words) for name, words in meant.items() if len(words) > 1}


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
    component that moved, rises and falls apart. A metric that moved in some run and not in another is censored there;
    of one that was past its threshold from the start the run tells nothing: None.
    """
    first = [_first_movements(one) for one in runs]
    metrics = dict.fromkeys(name for own in first for name, onset in own.items() if onset is not None)
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


def _first_movements(one: SweptRun) -> Mapping[str, Onset | None]:
    """Finds between which checkpoints each kind first moved; None if it was past its threshold from the start.

    Where no window dates it, what else is known counts: the ends of a window or of a steady growth, and that it had
    moved by its birth or half-rise.
    """
    windows = one.results.windows
    moved: dict[str, list[Onset]] = {}
    for window in windows.windows:
        within = Onset(window.start_step, window.end_step)
        for entry in window.order:
            kind = _kind(entry.metric, rises=entry.direction == "rise")
            moved.setdefault(kind, []).append(within if entry.between is None else Onset(*entry.between))
        for trigger in window.triggers:
            moved.setdefault(_kind(trigger.metric, rises=trigger.size > 0), []).append(within)
    for ramp in windows.ramps:
        kind = _kind(ramp.metric, rises=ramp.after > ramp.before)
        moved.setdefault(kind, []).append(Onset(ramp.start_step, ramp.end_step))
    for name, birth in windows.births.items():
        reached = (birth.step, birth.half_rise_step, birth.unconfirmed_step)
        moved.setdefault(name, []).extend(Onset(0, step) for step in reached if step is not None)
    # The earliest that is sure; of several by the same checkpoint, the one that lies between the nearest.
    found = {kind: min(own, key=lambda onset: (onset.by, -onset.after)) for kind, own in moved.items() if own}
    return found | {name: None for name, birth in windows.births.items() if birth.left_censored}


def _kind(metric: str, *, rises: bool) -> str:
    """Names what moved, without the component; a fall is another event than a rise."""
    kind = metric.partition(".")[0]
    return kind if rises else f"fall of {kind}"
