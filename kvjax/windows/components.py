"""Ranks the components of a run around a window, and says which of them rose and fell in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import ndtri

from kvjax.config.windows import WindowConfig
from kvjax.measure.statistics import places
from kvjax.measure.uncertainty import LEVEL
from kvjax.model.components import Component
from kvjax.windows.group_shifts import Shift, Window
from kvjax.windows.trajectories import ComponentDrops, Trajectories


def component_entries(
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
    above = first_above_null(components)
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


def component_changes(
    run: Trajectories, shifts: Sequence[Shift], config: WindowConfig
) -> dict[str, list[dict[str, Any]]]:
    """Lists the components whose importance rose and those whose importance fell, the largest change first.

    A component may rise on one split and fall on another.

    Args:
      run: the trajectories.
      shifts: those of a window.
      config: checkpoints averaged on each side.

    Returns:
      `rose` and `fell`, entries for `ComponentChange`.
    """
    levels: dict[str, dict[Component, dict[str, tuple[float, float]]]] = {"rose": {}, "fell": {}}
    for direction, sign in (("rose", 1), ("fell", -1)):
        moved = [shift for shift in shifts if run.metrics[shift.metric].is_importance and shift.size * sign > 0]
        for index in sorted({shift.metric for shift in moved}):
            metric, of_metric = run.metrics[index], [shift for shift in moved if shift.metric == index]
            first, last = min(shift.first for shift in of_metric), max(shift.last for shift in of_metric)
            side, values = config.side_checkpoints, run.values_CxM[:, index]
            before = float(np.nanmean(values[max(0, first - side + 1) : first + 1]))
            after = float(np.nanmean(values[last + 1 : last + 1 + side]))
            component = Component(metric.layer, metric.head)
            levels[direction].setdefault(component, {})[metric.split] = before, after
    return {
        direction: [
            {"component": str(component), "layer": component.layer, "head": component.head, "splits": of_splits}
            for component, of_splits in sorted(
                of_components.items(), key=lambda item: -max(abs(after - before) for before, after in item[1].values())
            )
        ]
        for direction, of_components in levels.items()
    }


def first_above_null(components: ComponentDrops) -> np.ndarray:
    """Finds the first checkpoint from which ablating each component costs more than guessing explains.

    The null hypothesis is a model that guesses among the values: its accuracy is chance, and an ablation may take all
    of it. A drop is above it if it exceeds chance by its deviation times the normal quantile of 5 % over all components
    and checkpoints together (Bonferroni). The deviation is the bootstrap's, and at least a guesser's: resamples of a
    few right answers hardly vary. The next checkpoint must exceed the null too, if there
    is one.

    Returns:
      Checkpoint indices [X]; C if there is none.
    """
    drops, chance = components.drops_CxX, components.chance
    n = len(drops)
    quantile = -ndtri((1 - LEVEL) / drops.size)
    guessing = np.sqrt(chance * (1 - chance) / components.num_reads)
    above = drops - chance > quantile * np.maximum(components.deviations_CxX, guessing)
    stays = above.copy()
    stays[:-1] &= above[1:]
    return np.where(stays.any(axis=0), stays.argmax(axis=0), n)
