"""Summarises how far a number differs between seeds, and splits its variance between settings and their seeds.

One-way random effects by the analysis of variance; the interval of the share is exact for balanced normal data.
Source: Searle, Casella and McCulloch, Variance Components (1992), chapter 3; Shrout and Fleiss 1979, ICC(1,1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import fdtri

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class VarianceShares:
    """How the variance of a summary splits.

    Attributes:
      between: variance between groups; 0 if groups differ less than their members do.
      within: variance within groups.
      share: between / (between + within); None if nothing varies.
      low, high: its 95 % interval, cut at 0; None without one.
    """

    between: float
    within: float
    share: float | None
    low: float | None
    high: float | None


def variance_shares(groups: Sequence[np.ndarray]) -> VarianceShares | None:
    """Estimates variances between and within groups; None unless there are two groups and one has two members.

    Args:
      groups: the values of each group's members; NaN is left out. Groups of unequal size use the mean size n0 of
        unbalanced one-way designs, and their interval is approximate.
    """
    kept = [values[np.isfinite(values)] for values in (np.asarray(group, float) for group in groups)]
    kept = [values for values in kept if len(values)]
    total, count = sum(map(len, kept)), len(kept)
    if count < 2 or total <= count:
        return None
    sizes = np.array([len(values) for values in kept])
    means = np.array([values.mean() for values in kept])
    grand = float(np.concatenate(kept).mean())
    mean_square_between = float((sizes * (means - grand) ** 2).sum()) / (count - 1)
    mean_square_within = sum(float(((v - v.mean()) ** 2).sum()) for v in kept) / (total - count)
    size = (total - (sizes**2).sum() / total) / (count - 1)
    between = max(0.0, (mean_square_between - mean_square_within) / size)
    spread = between + mean_square_within
    if spread == 0:
        return VarianceShares(0.0, 0.0, None, None, None)
    if mean_square_within == 0:
        return VarianceShares(between, 0.0, 1.0, None, None)  # all members alike: no ratio to form limits of
    ratio, freedom, tail = mean_square_between / mean_square_within, (count - 1, total - count), (1 - LEVEL) / 2
    # A limit of the ratio of mean squares is one of the share.
    limits = [ratio / fdtri(*freedom, 1 - tail), ratio / fdtri(*freedom, tail)]
    low, high = (float((limit - 1) / (limit - 1 + size)) for limit in limits)
    if high <= 0:  # the groups agree better than any share allows
        return VarianceShares(between, mean_square_within, between / spread, None, None)
    low = max(0.0, low)
    return VarianceShares(between, mean_square_within, between / spread, low, high)


@dataclasses.dataclass(frozen=True)
class SeedSpread:
    """How far a summary differs between seeds, beside the uncertainty of each one's value.

    Attributes:
      median, low, high: of the seeds that have one; low and high are the smallest and largest.
      deviation: standard deviation between seeds; None for fewer than two.
      sampling_share: largest share of the variance between seeds that the choice of sequences may account for, at most
        1; seeds that answer the same sequences differ by less, for what is hard is hard for all.
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


def spread_entry(values: Mapping[str, float | None], errors: Sequence[float | None] | None = None) -> dict[str, Any]:
    """Summarises one number per run by name, ready for `SpreadEntry`; `errors` as `seed_spread` takes them."""
    spread = seed_spread(list(values.values()), errors)
    fields = ("median", "low", "high", "deviation", "sampling_share")
    return {"values": dict(values), **{name: None if spread is None else getattr(spread, name) for name in fields}}


def known_number(value: Any) -> float | None:
    """Takes a number as JSON has it; None if it is missing, NaN or infinite."""
    return None if value is None or not np.isfinite(value) else float(value)
