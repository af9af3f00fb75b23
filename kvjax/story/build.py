"""Builds the story of a run from its sweep and birth windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import xarray as xr

from kvjax.artifacts.birth_windows_schema import BirthWindows, WindowEntry
from kvjax.artifacts.results import RunResults
from kvjax.artifacts.story_schema import (
    Carrier,
    Change,
    Component,
    HandoverEntry,
    Movement,
    Phase,
    Reach,
    ShareTrajectory,
    Story,
    ToldFrom,
)
from kvjax.artifacts.tables import SCHEMA_VERSION
from kvjax.config.windows import WindowConfig
from kvjax.errors import misfit, unusable
from kvjax.measure.uncertainty import DIFFERENCE_OF_RATES, percentile_interval, resample_counts
from kvjax.story import handovers, phases
from kvjax.story.behaviour import (
    Distances,
    Trajectory,
    accuracy_by_distance,
    share_change,
    split_accuracies,
    whole_accuracy,
)
from kvjax.story.shares import Shares, carrier_shares, measured_drops
from kvjax.windows.breaks import Breaks

LEVELS = ("head", "mlp")
ZERO = "zero"


@dataclasses.dataclass(frozen=True)
class _Measured:
    """The sweep and windows that a story is made from.

    Attributes:
      steps: [C] of the checkpoints that are one trajectory.
      breaks: where they are not.
      windows: as indices.
      shares: by level and kind of ablation.
      accuracy: by split.
      distances: accuracy by distance, by split.
      sequences: number of them.
      floor: smallest drop that means anything.
    """

    steps: np.ndarray
    breaks: Breaks
    windows: list[handovers.Span]
    shares: dict[tuple[str, str], Shares]
    accuracy: dict[str, Trajectory]
    distances: dict[str, Distances]
    sequences: int
    floor: float


def build_story(results: RunResults) -> Story:
    """Tells what happened in a run, without interventions.

    Raises:
      InputError: the run has no sweep, or no birth windows of it, that can be read.
    """
    windows, sweep, run = results.windows, results.sweep, results.run
    config = _config(results, windows)
    ablation = windows.ranked_by
    measured = _measure(results, windows, config, ablation)
    heads = measured.shares["head", ablation]
    clusters = phases.cluster_windows(measured.windows, heads)
    told, untold = [], []
    for cluster in clusters:
        phase = _phase(measured, windows, cluster, ablation)
        if any(x.holds for x in phase.accuracy.values()) or phase.components:
            told.append(phase)
        else:
            centres = ", ".join(map(str, phase.windows))
            plural = "s" if len(phase.windows) > 1 else ""
            untold.append(
                f"the window{plural} around step {centres}; no accuracy, and no drop by {measured.floor:g} or more, "
                "changes beyond its 95 % interval"
            )
    found = [
        _handover(measured, level, one, ablation)
        for level in LEVELS
        for one in handovers.find_handovers(
            measured.shares[level, ablation],
            measured.steps,
            measured.windows,
            persistence=config.persistence,
            jumps=measured.breaks.jumps,
            resumed=measured.breaks.resumed,
        )
    ]
    return Story(
        schema_version=SCHEMA_VERSION,
        run_name=run.config.run_name,
        seed=run.config.seed,
        told_from=ToldFrom(windows_sha256=windows.content_sha256, interventions={}),
        verdict=windows.verdict,
        reason=windows.reason,
        complete=windows.complete,
        ablation=ablation,
        persistence=config.persistence,
        floor=measured.floor,
        steps=measured.steps.tolist(),
        planned_steps=run.planned_steps,
        sequences=measured.sequences,
        reads=int(results.events["is_read"].values.sum()),
        chance=chance(results.metrics),
        accuracy={split: _numbers(one.values_C) for split, one in measured.accuracy.items()},
        phases=told,
        handovers=sorted(found, key=lambda one: one.between),
        shares=_share_trajectories(measured),
        untold=untold,
        notes=[found.reason for found in sweep.breaks],
    )


def chance(means: xr.Dataset) -> float | None:
    """Computes the accuracy of guessing a value; None if the sweep does not say how many there are."""
    values = means.attrs.get("num_values")
    return None if values is None else 1 / float(values)


def _config(results: RunResults, windows: BirthWindows) -> WindowConfig:
    """Reads the settings that the windows were found with."""
    import pydantic

    try:
        return WindowConfig.model_validate(windows.config)
    except pydantic.ValidationError as error:
        expected = "the settings of this version (run kvjax birth-windows again)"
        raise misfit(results.run.layout.birth_windows, error, expected) from None


def _measure(results: RunResults, windows: BirthWindows, config: WindowConfig, ablation: str) -> _Measured:
    breaks = Breaks.of(windows.measured_on.steps, windows.breaks)
    every = results.events["step"].values.tolist()
    if every != windows.measured_on.steps:
        expected = "the steps of sweep.json (run kvjax checkpoint-sweep again)"
        raise unusable(results.run.layout.arrays, expected, f"{len(every)} steps")
    steps = [step for step in every if step not in breaks.dropped]
    events = results.events.sel(step=steps)
    codes = np.unique(events["split"].values, return_inverse=True)[1]
    counts = resample_counts(codes, resamples=config.resamples, seed=config.resample_seed)
    guessed = chance(results.metrics) or 0.0
    whole = whole_accuracy(events, counts)
    above_chance = np.array([_low_end(whole, c) > guessed for c in range(len(steps))])
    floor = config.triggers.head_accuracy_drop.shift_floor
    shares = {
        (level, kind): carrier_shares(
            *measured_drops(events, level, kind, counts), floor=floor, above_chance_C=above_chance
        )
        for level in LEVELS
        for kind in dict.fromkeys((ablation, ZERO))
        if f"{level}_{kind}_correct" in events
    }
    accuracy = split_accuracies(events, counts)
    distances = {split: accuracy_by_distance(events, counts, split) for split in accuracy}
    return _Measured(
        steps=np.array(steps),
        breaks=breaks,
        windows=[_span(i, window, steps) for i, window in enumerate(windows.windows)],
        shares=shares,
        accuracy=accuracy,
        distances={split: found for split, found in distances.items() if found is not None},
        sequences=len(codes),
        floor=floor,
    )


def _low_end(accuracy: Trajectory, checkpoint: int) -> float:
    ends = accuracy.interval(checkpoint)
    return 0.0 if ends is None else ends[0]


def _span(index: int, window: WindowEntry, steps: Sequence[int]) -> handovers.Span:
    first, center, last = (steps.index(step) for step in (window.start_step, window.center_step, window.end_step))
    return handovers.Span(first, center, last, index)


def _phase(measured: _Measured, windows: BirthWindows, cluster: Sequence[handovers.Span], ablation: str) -> Phase:
    entries = [windows.windows[span.window] for span in cluster]
    first, last = cluster[0].first, cluster[-1].last
    triggers = [trigger for entry in entries for trigger in entry.triggers]
    heads, mlps = (measured.shares[level, ablation] for level in LEVELS)
    by_zero = measured.shares["head", ZERO]
    return Phase(
        windows=[entry.center_step for entry in entries],
        between=(int(measured.steps[first]), int(measured.steps[last])),
        steps=measured.steps[first : last + 1].tolist(),
        rose=phases.largest_shifts(triggers, rises=True),
        fell=phases.largest_shifts(triggers, rises=False),
        carriers_before=_carriers(measured, heads, first),
        carriers=_carriers(measured, heads, last),
        carriers_by_zero=[str(by_zero.components[x]) for x in by_zero.carriers(last)],
        mlps=_carriers(measured, mlps, last),
        components=[one for shares in (heads, mlps) for one in _changed(measured, shares, first, last)],
        accuracy={split: one.change(first, last) for split, one in measured.accuracy.items()},
        reach=_reaches(measured, heads, first, last),
    )


def _carriers(measured: _Measured, shares: Shares, checkpoint: int) -> list[Carrier]:
    found = []
    for x in shares.carriers(checkpoint):
        drop = _drop(measured, shares, x)
        found.append(
            Carrier(
                component=str(shares.components[x]),
                share=float(shares.shares_CxX[checkpoint, x]),
                share_interval=shares.share_interval(checkpoint, x),
                drop=float(drop.values_C[checkpoint]),
                drop_interval=drop.interval(checkpoint),
            )
        )
    return found


def _drop(measured: _Measured, shares: Shares, x: int) -> Trajectory:
    values, samples = shares.drops_CxX[:, x], shares.drop_samples_JxCxX[:, :, x]
    return Trajectory(values, samples, measured.sequences, DIFFERENCE_OF_RATES)


def _changed(measured: _Measured, shares: Shares, first: int, last: int) -> list[Component]:
    """Lists components whose drop changed by the floor or more and beyond its interval, the largest change first."""
    found = []
    for x, component in enumerate(shares.components):
        drop = _drop(measured, shares, x).change(first, last)
        if drop.holds and abs(drop.change) >= measured.floor:
            found.append(
                Component(component=str(component), drop=drop, share=_share(shares, x, first, np.array([last])))
            )
    return sorted(found, key=lambda one: -abs(one.drop.change))


def _share(shares: Shares, x: int, before: int, after: np.ndarray) -> Change:
    return share_change(shares.shares_CxX[:, x], shares.samples_JxCxX[:, :, x], before, after)


def _reaches(measured: _Measured, heads: Shares, first: int, last: int) -> dict[str, Reach]:
    return {split: one.reach(first, last, answers_C=heads.carried_C) for split, one in measured.distances.items()}


def _handover(measured: _Measured, level: str, found: handovers.Handover, ablation: str) -> HandoverEntry:
    shares, by_zero, steps = measured.shares[level, ablation], measured.shares[level, ZERO], measured.steps

    def names(movements: Sequence[handovers.Movement]) -> list[str]:
        return [str(shares.components[m.component]) for m in movements]

    def movement(m: handovers.Movement) -> Movement:
        return Movement(
            component=str(shares.components[m.component]),
            share=_share(shares, m.component, m.begins, found.after),
            share_by_zero=_share(by_zero, m.component, m.begins, found.after),
            midpoint=m.midpoint,
            interval=tuple(int(steps[c]) for c in m.interval),
            held_from=int(steps[m.held_from]),
            further_checkpoints=m.further,
        )

    def centre(span: handovers.Span) -> int | None:
        return None if span.window is None else int(steps[span.center])

    heads, last = measured.shares["head", ablation], int(found.after[-1])
    return HandoverEntry(
        from_components=names(found.lost),
        to_components=names(found.gained),
        between=tuple(int(steps[c]) for c in found.between),
        windows=(centre(found.earlier), centre(found.later)),
        level=level,
        movements=[movement(m) for m in (*found.lost, *found.gained)],
        support=found.support,
        persisted=found.persisted,
        measured_at=(int(steps[found.before]), int(steps[last])),
        accuracy={split: one.change(found.before, last) for split, one in measured.accuracy.items()},
        reach=_reaches(measured, heads, found.before, last),
    )


def _share_trajectories(measured: _Measured) -> dict[str, list[ShareTrajectory]]:
    found: dict[str, list[ShareTrajectory]] = {}
    for (_, ablation), shares in measured.shares.items():
        for x, component in enumerate(shares.components):
            low, high = percentile_interval(shares.samples_JxCxX[:, :, x])
            row = ShareTrajectory(
                component=str(component),
                share=_numbers(shares.shares_CxX[:, x]),
                low=_numbers(low),
                high=_numbers(high),
            )
            found.setdefault(ablation, []).append(row)
    return found


def _numbers(values: np.ndarray) -> list[float | None]:
    """Rounds numbers to 6 digits; null if there is none."""
    return [round(float(value), 6) if np.isfinite(value) else None for value in values]
