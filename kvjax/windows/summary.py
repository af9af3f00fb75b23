"""Builds the entries of `birth_windows.json`: births, and per window its triggers, order of metrics and components."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import ndtri

from kvjax.config.windows import WindowConfig
from kvjax.measure import registry
from kvjax.measure.registry import BIRTH_SPLIT
from kvjax.measure.statistics import places
from kvjax.measure.uncertainty import LEVEL
from kvjax.windows.group_shifts import Shift, Window
from kvjax.windows.onset import birth, birth_indices, half_rise_indices, probability_of_preceding
from kvjax.windows.score_runs import RunFinding, course_steps
from kvjax.windows.trajectories import ComponentDrops, Metric, Trajectories


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
    needed = f"{config.corroboration} metrics together need {config.threshold:g}, one alone {config.threshold_alone:g}"
    return (
        f"no shifts{so_far} are strong enough: the strongest, in {metric.measure} on {metric.split} at step {step} "
        f"({largest.size:+.3g}), scores {largest.score:.1f}; {needed}"
    )


def births(
    run: Trajectories, *, thresholds: Mapping[str, float], config: WindowConfig, complete: bool
) -> dict[str, dict[str, Any]]:
    """Lists the births of a run's behavioural metrics, ready for `BirthEntry`.

    Args:
      run: its trajectories.
      thresholds: metric -> the value at which it counts as born; metrics without one have a half-rise only.
      config: persistence, sides and floors.
      complete: whether the run is finished. Half-rises need its plateau, and are None otherwise.
    """
    entries = {}
    for measure, field in registry.triggers():
        if measure.level != "read":
            continue
        name, split = field.trigger, field.where.get("split", BIRTH_SPLIT)
        index = _index_of(run.metrics, name, split)
        if index is None:
            continue
        values, samples = run.values_CxM[:, index], run.samples_JxCxM[:, :, index]
        entry: dict[str, Any] = {"split": split, "threshold": thresholds.get(name)}
        entry |= _birth_entry(run.steps, values, samples, thresholds.get(name), config.persistence)
        entry |= {"half_rise_step": None, "half_rise_interval": None}
        if entry["step"] is not None and run.steps.tolist().index(entry["step"]) - 1 in run.breaks.jumps:
            entry["reason"] += "; the checkpoint before it is of another trajectory"
        if complete and len(run.steps) >= config.min_checkpoints:
            floor = getattr(config.triggers, name).shift_floor
            side = min(config.side_checkpoints, len(run.steps) // 2)
            (half,) = half_rise_indices(values[None], side=side, floor=floor).tolist()
            if half < len(run.steps):
                entry["half_rise_step"] = int(run.steps[half])
                halves = half_rise_indices(samples, side=side, floor=floor)
                entry["half_rise_interval"] = _step_interval(halves, run.steps)
        entries[name] = entry
    return entries


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
                "triggers": [_trigger(run, shift) for shift in window.shifts],
                "order": order,
                "precedes": precedes,
                "components": _components(run.steps, window, components, config),
            }
        )
    return entries


def _index_of(metrics: Sequence[Metric], measure: str, split: str) -> int | None:
    matching = [i for i, metric in enumerate(metrics) if (metric.measure, metric.split) == (measure, split)]
    return matching[0] if matching else None


def _birth_entry(
    steps: np.ndarray, values: np.ndarray, samples: np.ndarray, threshold: float | None, persistence: int
) -> dict[str, Any]:
    nothing = {"step": None, "interval": None, "censored": False, "left_censored": False}
    if threshold is None:
        return nothing | {"reason": "the run's config has no threshold for it"}
    born = birth(values, threshold, persistence=persistence)
    if born.index is not None:
        interval = _step_interval(birth_indices(samples, threshold, persistence=persistence), steps)
        reason = f"at or above {threshold:g} and so at {persistence} further checkpoints"
        if before_first := born.index == 0:
            reason += f"; step {int(steps[0])} is the first measured checkpoint, so that it may have been born before"
        return nothing | {
            "step": int(steps[born.index]),
            "interval": interval,
            "left_censored": before_first,
            "reason": reason,
        }
    if born.first_reached is None:
        reason = f"stays below {threshold:g} until the last measured checkpoint, {int(steps[-1])}"
    elif born.open_ended:
        reason = f"at or above {threshold:g} at the last measured checkpoint, with too few further ones to call it born"
    else:
        reason = f"reaches {threshold:g} first at step {int(steps[born.first_reached])}, but does not stay there"
    return nothing | {"censored": True, "reason": reason}


def _step_interval(indices_J: np.ndarray, steps: np.ndarray) -> tuple[int | None, int | None]:
    """Computes the percentile interval of checkpoint indices, as steps; None for an end beyond the run.

    A low end at the first checkpoint lies beyond the run too: what was there already came before.
    """
    ordered = np.sort(indices_J)
    tail = (1 - LEVEL) / 2
    ends = [ordered[int(np.floor(tail * (len(ordered) - 1)))], ordered[int(np.ceil((1 - tail) * (len(ordered) - 1)))]]
    low, high = (int(steps[end]) if end < len(steps) else None for end in ends)
    return None if ends[0] == 0 else low, high


def _trigger(run: Trajectories, shift: Shift) -> dict[str, Any]:
    metric = run.metrics[shift.metric]
    return {
        "kind": metric.kind,
        "metric": metric.measure,
        "split": metric.split,
        "step": int(run.steps[shift.gap + 1]),
        "size": shift.size,
        "score": shift.score,
    }


def _order(
    run: Trajectories, window: Window, every: Sequence[Shift], config: WindowConfig
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Orders measures by when they moved, earliest first, and finds which preceded which."""
    shifts = _one_per_measure(run.metrics, window.shifts)
    side = config.side_checkpoints
    point = course_steps(run.values_CxM[None], run.steps, shifts, every, side=side)[0]
    samples = course_steps(run.samples_JxCxM, run.steps, shifts, every, side=side)
    ranked = sorted(range(len(shifts)), key=lambda i: (np.nan_to_num(point[i, 1], nan=np.inf), i))
    entries = []
    for i in ranked:
        metric, midpoint = run.metrics[shifts[i].metric], point[i, 1]
        midpoints = samples[:, i, 1]
        known = midpoints[np.isfinite(midpoints)]
        tail = 50 * (1 - LEVEL)
        varies = metric.resampled and len(known) > 0
        interval = tuple(np.percentile(known, [tail, 100 - tail]).tolist()) if varies else None
        onset, midpoint, completion = (float(x) if np.isfinite(x) else None for x in point[i])
        entries.append(
            {
                "metric": metric.measure,
                "split": metric.split,
                "onset": onset,
                "midpoint": midpoint,
                "completion": completion,
                "interval": interval,
                "between": _between(midpoint, run.steps),
            }
        )
    precedes = []
    for a, i in enumerate(ranked):
        for j in ranked[a + 1 :]:
            if not any(run.metrics[shifts[k].metric].resampled for k in (i, j)):
                continue  # no resample says how sure their order is
            probability = probability_of_preceding(samples[:, i, 1], samples[:, j, 1], run.steps)
            if probability is not None:
                names = [run.metrics[shifts[k].metric].measure for k in (i, j)]
                precedes.append({"first": names[0], "second": names[1], "probability": probability})
    return entries, precedes


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


def _between(midpoint: float | None, steps: np.ndarray) -> tuple[int, int] | None:
    if midpoint is None:
        return None
    after = int(np.clip(np.searchsorted(steps, midpoint, side="left"), 1, len(steps) - 1))
    return int(steps[after - 1]), int(steps[after])


def _components(
    steps: np.ndarray, window: Window, components: ComponentDrops, config: WindowConfig
) -> list[dict[str, Any]]:
    """Ranks every head and MLP by the accuracy its ablation costs before, inside and after a window, inside first.

    "Before" averages the last checkpoints up to the window's first, "after" the first ones from its last on, "inside"
    those between.
    """
    drops = components.drops_CxX
    side = config.side_checkpoints
    before = drops[max(0, window.first - side + 1) : window.first + 1].mean(axis=0)
    inside = drops[window.first + 1 : window.last].mean(axis=0)
    after = drops[window.last : window.last + side].mean(axis=0)
    ranks = [places(values) for values in (before, inside, after)]
    above = _first_above_null(drops, components.deviations_CxX)
    entries = []
    for x in np.argsort(-inside, kind="stable").tolist():
        component = components.components[x]
        entries.append(
            {
                "layer": component.layer,
                "head": component.head,
                "importance_before": float(before[x]),
                "importance_inside": float(inside[x]),
                "importance_after": float(after[x]),
                "rank_before": int(ranks[0][x]),
                "rank_inside": int(ranks[1][x]),
                "rank_after": int(ranks[2][x]),
                "first_step_above_null": int(steps[above[x]]) if above[x] < len(steps) else None,
                "left_censored": bool(above[x] == 0),
            }
        )
    return entries


def _first_above_null(drops_CxX: np.ndarray, deviations_CxX: np.ndarray) -> np.ndarray:
    """Finds the first checkpoint where ablating each component costs accuracy significantly, there and at the next.

    The null hypothesis is that ablating costs nothing. It is rejected if the drop exceeds its bootstrap standard
    deviation times the normal quantile at 5 % over all components and checkpoints together (Bonferroni). The next
    checkpoint must reject it too, if there is one.

    Returns:
      Checkpoint indices [X]; C if there is none.
    """
    n = len(drops_CxX)
    quantile = -ndtri((1 - LEVEL) / drops_CxX.size)
    above = (drops_CxX > 0) & (drops_CxX > quantile * deviations_CxX)
    stays = above.copy()
    stays[:-1] &= above[1:]
    return np.where(stays.any(axis=0), stays.argmax(axis=0), n)
