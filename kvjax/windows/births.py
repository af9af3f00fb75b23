"""Lists when the behavioural metrics of a run were born and half risen, ready for `BirthEntry`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvjax.config.windows import WindowConfig
from kvjax.measure import registry
from kvjax.measure.registry import BIRTH_SPLIT
from kvjax.measure.uncertainty import LEVEL
from kvjax.windows.onset import birth, birth_indices, half_rise_indices
from kvjax.windows.trajectories import Metric, Trajectories

# Why a metric has no threshold of its own accord.
_NO_THRESHOLD = {
    "q": "it has no default threshold: the key of a read stands at p_e, so that q is attention of p_e to itself and no "
    "sign of lookup"
}


def births(
    run: Trajectories, *, thresholds: Mapping[str, float], config: WindowConfig, complete: bool
) -> dict[str, dict[str, Any]]:
    """Lists the births of a run's behavioural metrics, ready for `BirthEntry`.

    Args:
      run: its trajectories.
      thresholds: metric -> the value at which it counts as born; metrics without one have a half-rise only.
      config: persistence, sides and floors.
      complete: whether the run has reached its planned end. If not, half-rises are to the plateau at its last
        checkpoints and are provisional.
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
        entry |= _birth_entry(name, run.steps, values, samples, thresholds.get(name), config.persistence)
        entry |= {"half_rise_step": None, "half_rise_interval": None, "provisional": not complete}
        if entry["step"] is not None and run.steps.tolist().index(entry["step"]) - 1 in run.breaks.jumps:
            entry["reason"] += "; the checkpoint before it is of another trajectory"
        if len(run.steps) >= config.min_checkpoints:
            floor = getattr(config.triggers, name).shift_floor
            side = min(config.side_checkpoints, len(run.steps) // 2)
            (half,) = half_rise_indices(values[None], side=side, floor=floor).tolist()
            if half < len(run.steps):
                entry["half_rise_step"] = int(run.steps[half])
                halves = half_rise_indices(samples, side=side, floor=floor)
                entry["half_rise_interval"] = _step_interval(halves, run.steps)
        entries[name] = entry
    return entries


def _index_of(metrics: Sequence[Metric], measure: str, split: str) -> int | None:
    matching = [i for i, metric in enumerate(metrics) if (metric.measure, metric.split) == (measure, split)]
    return matching[0] if matching else None


def _birth_entry(
    name: str, steps: np.ndarray, values: np.ndarray, samples: np.ndarray, threshold: float | None, persistence: int
) -> dict[str, Any]:
    nothing = {"step": None, "interval": None, "censored": False, "unconfirmed_step": None, "left_censored": False}
    if threshold is None:
        return nothing | {"reason": _NO_THRESHOLD.get(name, "the run's config has no threshold for it")}
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
    elif born.open_from is not None:
        since = int(steps[born.open_from])
        reason = f"at or above {threshold:g} from step {since} on, with too few further checkpoints to call it born"
        return nothing | {"censored": True, "unconfirmed_step": since, "reason": reason}
    else:
        reason = f"reaches {threshold:g} first at step {int(steps[born.first_reached])}, but does not stay there"
    return nothing | {"censored": True, "reason": reason}


def _step_interval(indices_J: np.ndarray, steps: np.ndarray) -> tuple[int | None, int | None]:
    """Computes the interval of a birth from its checkpoint's index under resamples, as steps.

    It came after the checkpoint before the earliest 2.5 % of them and not after that of the latest 2.5 %. An end is
    None if it lies beyond the run: what was there at the first checkpoint came before.
    """
    ordered = np.sort(indices_J)
    tail = (1 - LEVEL) / 2
    low, high = (
        ordered[int(np.floor(tail * (len(ordered) - 1)))],
        ordered[int(np.ceil((1 - tail) * (len(ordered) - 1)))],
    )
    return (
        int(steps[low - 1]) if 0 < low < len(steps) else None,
        int(steps[high]) if high < len(steps) else None,
    )
