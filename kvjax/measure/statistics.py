"""Ranks and rank correlations of numbers that stand side by side (docs/definitions.md, "Dynamics").

SciPy has them too, but its `stats` takes most of a second to import, and every command would pay for it.
"""

from __future__ import annotations

import numpy as np


def ranking(values: np.ndarray) -> np.ndarray:
    """Orders component indices by value, largest first, ties by index; `values` is [components]."""
    return np.argsort(-values, kind="stable")


def places(values: np.ndarray) -> np.ndarray:
    """Numbers components by value, from 1, largest first, ties by index; any shape, kept."""
    numbered = np.empty(values.size, int)
    numbered[ranking(values.ravel())] = np.arange(1, values.size + 1)
    return numbered.reshape(values.shape)


def average_ranks(values_xN: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, from 1, smallest first; equal values share the mean of their ranks, [..., N]."""
    order = np.argsort(values_xN, axis=-1, kind="stable")
    ordered = np.take_along_axis(values_xN, order, axis=-1)
    at = np.broadcast_to(np.arange(ordered.shape[-1]), ordered.shape)
    edge = np.ones((*ordered.shape[:-1], 1), bool)
    differs = ordered[..., 1:] != ordered[..., :-1]
    # Every run of equal values has a first and a last place; its rank lies midway.
    first = np.maximum.accumulate(np.where(np.concatenate([edge, differs], axis=-1), at, 0), axis=-1)
    ends = np.where(np.concatenate([differs, edge], axis=-1), at, ordered.shape[-1])
    last = np.minimum.accumulate(ends[..., ::-1], axis=-1)[..., ::-1]
    ranks = np.empty(ordered.shape)
    np.put_along_axis(ranks, order, (first + last) / 2 + 1, axis=-1)
    return ranks


def spearman(a_xN: np.ndarray, b_xN: np.ndarray) -> np.ndarray:
    """Correlates the average ranks of two sets of numbers along their last axis.

    Returns:
      [...]; NaN if either side is constant or lacks a value.
      Source: Spearman, The proof and measurement of association between two things (1904).
    """
    a, b = (_centred_ranks(np.asarray(x, np.float64)) for x in (a_xN, b_xN))
    scale = np.sqrt(np.sum(a**2, axis=-1) * np.sum(b**2, axis=-1))
    return np.divide(np.sum(a * b, axis=-1), scale, out=np.full(scale.shape, np.nan), where=scale > 0)


def _centred_ranks(values_xN: np.ndarray) -> np.ndarray:
    ranks = average_ranks(values_xN)
    centred = ranks - ranks.mean(axis=-1, keepdims=True)
    return np.where(np.isnan(values_xN).any(axis=-1, keepdims=True), np.nan, centred)
