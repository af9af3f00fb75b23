"""Builds the entries of `birth_windows.json`: the verdict, and per window its triggers and the order of metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvjax.config.windows import WindowConfig
from kvjax.measure.registry import BIRTH_SPLIT
from kvjax.windows.components import component_changes, component_entries
from kvjax.windows.find_in_run import RunFinding, course_steps
from kvjax.windows.group_shifts import Shift, Window, whole_movements
from kvjax.windows.onset import COURSE, gap_around, observed_interval, precedence
from kvjax.windows.trajectories import ComponentDrops, Metric, Trajectories

# Levels before and after a movement are looked for within so many times the checkpoints of a shift's sides.
_TIMES_FURTHER = (1, 2, 4, 8, 16)
# So many resamples say how sure each of those dates is; all would take most of the search's time on a dense run.
_RESAMPLES_FURTHER = 100


def verdict_sentence(finding: RunFinding, config: WindowConfig, *, complete: bool) -> str:
    """States the reason for the verdict in one sentence."""
    count = len(finding.trajectories.steps)
    so_far = "" if complete else " so far"
    if finding.verdict == "windows":
        number = len(finding.windows)
        return f"{number} window{'s' if number > 1 else ''}{so_far} among {count} checkpoints"
    if finding.verdict == "undecidable":
        if count < config.min_checkpoints:
            return (
                f"{count} measured checkpoint{'s' if count > 1 else ''}: a shift needs at least "
                f"{config.min_side_checkpoints} on each side, {config.min_checkpoints} in all, to be told from noise"
            )
        return f"no metric has values at enough of the {count} checkpoints to be scored"
    if finding.largest is None:
        return f"no metric shifted{so_far} beyond its floor and held, at any of {count} checkpoints"
    largest, metric = finding.largest, finding.trajectories.metrics[finding.largest.metric]
    step = int(finding.trajectories.steps[largest.gap + 1])
    strongest = f"the strongest, in {metric.measure} on {metric.split} at step {step} ({largest.size:+.3g}),"
    if any(shift.metric == largest.metric and shift.first <= largest.gap <= shift.last for shift in finding.growing):
        return f"no shifts{so_far} are more than steady growth, which explains {strongest} as well"
    needed = f"{config.corroboration} metrics together need {config.threshold:g}, one alone {config.threshold_alone:g}"
    return f"no shifts{so_far} are strong enough: {strongest} scores {largest.score:.1f}; {needed}"


def window_entries(finding: RunFinding, components: ComponentDrops, config: WindowConfig) -> list[dict[str, Any]]:
    """Describes the windows of a run, ready for `WindowEntry`."""
    run = finding.trajectories
    every = [shift for window in finding.windows for shift in window.shifts]
    entries = []
    for window in finding.windows:
        order, precedes = _order(run, window, every, config)
        entries.append(
            {
                "start_step": int(run.steps[window.first]),
                "center_step": int(run.steps[window.gap + 1]),
                "end_step": int(run.steps[window.last]),
                "steps": run.steps[window.first : window.last + 1].tolist(),
                "triggers": [_trigger(finding, shift) for shift in window.shifts],
                "order": order,
                "precedes": precedes,
                "components": component_entries(run.steps, window, components, config),
                **component_changes(run, window.shifts, config),
            }
        )
    return entries


def ramp_entries(finding: RunFinding) -> list[dict[str, Any]]:
    """Describes the ramps of a run, ready for `RampEntry`, the largest score first."""
    run = finding.trajectories
    entries = []
    for ramp in sorted(finding.ramps, key=lambda ramp: -ramp.score):
        metric = run.metrics[ramp.metric]
        entries.append(
            {
                "kind": metric.kind,
                "metric": metric.measure,
                "split": metric.split,
                "start_step": int(run.steps[ramp.first]),
                "end_step": int(run.steps[ramp.last]),
                "before": ramp.before,
                "after": ramp.after,
                "score": ramp.score,
            }
        )
    return entries


def _trigger(finding: RunFinding, shift: Shift) -> dict[str, Any]:
    run, origin = finding.trajectories, finding.origins.get(shift, shift)
    metric = run.metrics[shift.metric]
    return {
        "kind": metric.kind,
        "metric": metric.measure,
        "split": metric.split,
        "step": int(run.steps[shift.gap + 1]),
        "size": shift.size,
        "score": shift.score,
        "repeats": None if origin is shift else run.metrics[origin.metric].measure,
    }


def _order(
    run: Trajectories, window: Window, every: Sequence[Shift], config: WindowConfig
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Orders measures by when they moved, earliest first, and finds which preceded which."""
    shifts = _one_per_measure(run.metrics, window.shifts)
    side = config.side_checkpoints
    values = run.values_CxM[None]
    point = course_steps(values, run.steps, shifts, every, side=side)[0]
    # What is at rest before and after depends on how far one looks. On a dense run a shift is part of its movement, and
    # the checkpoints beside it still move: of those further away the nearer half is left out.
    movements = whole_movements([*every, *shifts], run.values_CxM, run.steps)

    def of_movements(values: np.ndarray, times: int) -> np.ndarray:
        at = {"side": times * side, "skipped": times * side // 2 if times > 1 else 0}
        return course_steps(values, run.steps, movements[len(every) :], movements, **at)

    levels = [point, *(of_movements(values, times)[0] for times in _TIMES_FURTHER)]
    samples = course_steps(run.samples_JxCxM, run.steps, shifts, every, side=side)
    further = [of_movements(run.samples_JxCxM[:_RESAMPLES_FURTHER], times) for times in _TIMES_FURTHER]
    ranked = sorted(range(len(shifts)), key=lambda i: (np.nan_to_num(point[i, 1], nan=np.inf), i))
    entries = []
    for i in ranked:
        metric = run.metrics[shifts[i].metric]
        # Values that repeat say nothing of sampling.
        resampled = [samples, *further] if metric.resampled else []
        onset, midpoint, completion = (
            observed_interval(np.array([of[i, k] for of in levels]), [of[:, i, k] for of in resampled], run.steps)
            for k in range(len(COURSE))
        )
        entries.append(
            {
                "metric": metric.measure,
                "split": metric.split,
                "direction": "rise" if shifts[i].size > 0 else "fall",
                **{name: _step(moment) for name, moment in zip(COURSE, point[i], strict=True)},
                "interval": midpoint,
                "onset_interval": onset,
                "completion_interval": completion,
                "between": None if midpoint is None else gap_around(point[i, 1], run.steps),
            }
        )
    precedes = []
    for a, i in enumerate(ranked):
        for j in ranked[a + 1 :]:
            if not any(run.metrics[shifts[k].metric].resampled for k in (i, j)):
                continue  # no resample says how sure their order is
            order = precedence(samples[:, i, 1], samples[:, j, 1], run.steps)
            if order is not None:
                first, second = (run.metrics[shifts[k].metric].measure for k in (i, j))
                precedes.append({"first": first, "second": second, **dataclasses.asdict(order)})
    return entries, precedes


def _step(moment: float) -> float | None:
    return float(moment) if np.isfinite(moment) else None


def _one_per_measure(metrics: Sequence[Metric], shifts: Sequence[Shift]) -> list[Shift]:
    """Picks one shift for every measure that moved: on the preferred split if it moved there, else the strongest.

    Shifts of one metric that a window holds in the same direction are one movement.
    """
    chosen: dict[str, list[Shift]] = {}
    for shift in sorted(shifts, key=lambda s: (metrics[s.metric].split != BIRTH_SPLIT, -s.score)):
        group = chosen.setdefault(metrics[shift.metric].measure, [shift])
        if shift is not group[0] and shift.metric == group[0].metric and np.sign(shift.size) == np.sign(group[0].size):
            group.append(shift)
    return [
        dataclasses.replace(group[0], first=min(s.first for s in group), last=max(s.last for s in group))
        for group in chosen.values()
    ]
