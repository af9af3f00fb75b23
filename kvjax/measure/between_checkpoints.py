"""How a run's measures move from checkpoint to checkpoint (docs/definitions.md, sections 6 and 7)."""

from __future__ import annotations

import numpy as np
import pandas as pd


def change_from_previous(values: np.ndarray) -> np.ndarray:
    """Returns each checkpoint's value minus the previous one's, [C, …]; NaN for the first, which has none."""
    changes = np.full(values.shape, np.nan)
    changes[1:] = values[1:] - values[:-1]
    return changes


def ranking(values: np.ndarray) -> np.ndarray:
    """Returns component indices by value, largest first, ties by index; `values` is [components]."""
    return np.argsort(-values, kind="stable")


def places(values: np.ndarray) -> np.ndarray:
    """Returns each component's place by value, from 1, largest first, ties by index; of the shape of `values`."""
    found = np.empty(values.size, int)
    found[ranking(values.ravel())] = np.arange(1, values.size + 1)
    return found.reshape(values.shape)


def rank_correlation_to_previous(values_CxN: np.ndarray) -> np.ndarray:
    """Returns Spearman's correlation (average ranks) of each checkpoint's component values with the previous one's.

    Returns:
      [C]; NaN for the first checkpoint, and where either side is constant.
    """
    # pandas is loaded with xarray anyway; scipy.stats would take another second to import.
    ranks = pd.DataFrame(values_CxN).rank(axis=1).to_numpy()
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    sizes = np.linalg.norm(centred, axis=1)
    correlations = np.full(len(values_CxN), np.nan)
    varies = (sizes[1:] > 0) & (sizes[:-1] > 0)
    products = np.sum(centred[1:] * centred[:-1], axis=1)
    correlations[1:][varies] = products[varies] / (sizes[1:] * sizes[:-1])[varies]
    return correlations


def turnover_from_previous(values_CxN: np.ndarray, k: int) -> np.ndarray:
    """Returns 1 - |top-k with previous top-k| / |their union|, [C]; NaN for the first checkpoint."""
    tops = [set(ranking(values)[:k].tolist()) for values in values_CxN]
    turnovers = np.full(len(tops), np.nan)
    for c in range(1, len(tops)):
        turnovers[c] = 1.0 - len(tops[c] & tops[c - 1]) / len(tops[c] | tops[c - 1])
    return turnovers


def stays_stable(stable_C: np.ndarray) -> np.ndarray:
    """Returns whether each checkpoint and every later one is stable, bool [C]: where stability begins and holds."""
    return np.logical_and.accumulate(stable_C[::-1])[::-1]
