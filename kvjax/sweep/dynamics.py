"""How a run's measures move from checkpoint to checkpoint (docs/definitions.md, sections 6 and 7)."""

from __future__ import annotations

import numpy as np
from scipy import stats


def change_from_previous(values: np.ndarray) -> np.ndarray:
    """Returns each checkpoint's value minus the previous one's, [C, …]; NaN for the first, which has none."""
    changes = np.full(values.shape, np.nan)
    changes[1:] = values[1:] - values[:-1]
    return changes


def ranking(values: np.ndarray) -> np.ndarray:
    """Returns component indices by value, largest first, ties by index; `values` is [components]."""
    return np.argsort(-values, kind="stable")


def rank_correlation_to_previous(values_CxN: np.ndarray) -> np.ndarray:
    """Returns Spearman's correlation (average ranks) of each checkpoint's component values with the previous one's.

    Returns:
      [C]; NaN for the first checkpoint, and where either side is constant.
    """
    correlations = np.full(len(values_CxN), np.nan)
    for c in range(1, len(values_CxN)):
        previous, current = values_CxN[c - 1], values_CxN[c]
        if np.ptp(previous) > 0 and np.ptp(current) > 0:
            correlations[c] = stats.spearmanr(previous, current).statistic
    return correlations


def turnover_from_previous(values_CxN: np.ndarray, k: int) -> np.ndarray:
    """Returns 1 - |top-k with previous top-k| / |their union|, [C]; NaN for the first checkpoint."""
    tops = [set(ranking(values)[:k].tolist()) for values in values_CxN]
    turnovers = np.full(len(tops), np.nan)
    for c in range(1, len(tops)):
        turnovers[c] = 1.0 - len(tops[c] & tops[c - 1]) / len(tops[c] | tops[c - 1])
    return turnovers
