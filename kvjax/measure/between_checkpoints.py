"""Changes of a run's measures from checkpoint to checkpoint (docs/definitions.md, "Dynamics")."""

from __future__ import annotations

import numpy as np

from kvjax.measure.statistics import ranking, spearman


def change_from_previous(values: np.ndarray) -> np.ndarray:
    """Subtracts the previous checkpoint's value from each, [C, …]; NaN for the first, which has no predecessor."""
    changes = np.full(values.shape, np.nan)
    changes[1:] = values[1:] - values[:-1]
    return changes


def rank_correlation_to_previous(values_xCxN: np.ndarray) -> np.ndarray:
    """Correlates each checkpoint's component values with the previous one's by rank (Spearman).

    Returns:
      [..., C]; NaN for the first checkpoint, and if either side is constant.
    """
    correlations = np.full(values_xCxN.shape[:-1], np.nan)
    correlations[..., 1:] = spearman(values_xCxN[..., 1:, :], values_xCxN[..., :-1, :])
    return correlations


def turnover_from_previous(values_CxN: np.ndarray, k: int) -> np.ndarray:
    """Computes 1 - |top-k with previous top-k| / |their union|, [C]; NaN for the first checkpoint."""
    tops = [set(ranking(values)[:k].tolist()) for values in values_CxN]
    turnovers = np.full(len(tops), np.nan)
    for c in range(1, len(tops)):
        turnovers[c] = 1.0 - len(tops[c] & tops[c - 1]) / len(tops[c] | tops[c - 1])
    return turnovers


def stays_stable(stable_C: np.ndarray) -> np.ndarray:
    """Tells from which checkpoint on every one is stable, bool [C]."""
    return np.logical_and.accumulate(stable_C[::-1])[::-1]
