"""Summarises how far a number differs between seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class SeedSpread:
    """How far a summary differs between seeds, beside the uncertainty of each one's value.

    Attributes:
      median, low, high: of the seeds that have one; low and high are the smallest and largest.
      deviation: standard deviation between seeds; None for fewer than two.
      sampling_share: share of the variance between seeds that the choice of sequences alone would give, at most 1;
        None if it is unknown.
    """

    median: float
    low: float
    high: float
    deviation: float | None
    sampling_share: float | None


def seed_spread(values: Sequence[float | None], errors: Sequence[float | None] | None = None) -> SeedSpread | None:
    """Summarises one number per seed; None if no seed has one.

    Args:
      values: one per seed; None or NaN if it has none.
      errors: standard error of each value from the choice of sequences, if known.
    """
    numbers = np.array([np.nan if value is None else value for value in values], float)
    known = np.isfinite(numbers)
    if not known.any():
        return None
    own = numbers[known]
    deviation = float(own.std(ddof=1)) if len(own) > 1 else None
    share = None
    if errors is not None and deviation:
        squares = np.array([np.nan if error is None else error for error in errors], float)[known] ** 2
        if np.isfinite(squares).all():
            share = min(1.0, float(squares.mean() / deviation**2))
    return SeedSpread(float(np.median(own)), float(own.min()), float(own.max()), deviation, share)
