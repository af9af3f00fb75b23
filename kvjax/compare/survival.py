"""Estimates when something forms over seeds, of which some have not formed it by their last checkpoint.

Such a seed is a censored observation: it says that the birth comes later. Source: Kaplan and Meier 1958; Greenwood's
variance; limits on the log-log scale (Kalbfleisch and Prentice 2002, section 1.4).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

from scipy.special import ndtri

LEVEL = 0.95
_QUANTILE = float(ndtri(0.5 + LEVEL / 2))


@dataclasses.dataclass(frozen=True)
class Observation:
    """When one seed formed something.

    Attributes:
      step: the checkpoint at which it has formed, or the last checkpoint at which it has not.
      formed: whether it has; if not, the observation is censored.
    """

    step: int
    formed: bool


@dataclasses.dataclass(frozen=True)
class Survival:
    """The share of seeds that have not formed something, over steps.

    Attributes:
      steps: at which at least one seed formed it, ascending.
      shares: not formed after each of these steps.
      low, high: 95 % limits of each share; None if the share is 0 or 1.
      median: the first step after which at most half of the seeds have not formed it; None if there is none.
      median_low, median_high: 95 % limits of the median; None for a limit beyond what was observed.
      formed, total: seeds.
    """

    steps: tuple[int, ...]
    shares: tuple[float, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]
    median: int | None
    median_low: int | None
    median_high: int | None
    formed: int
    total: int


def kaplan_meier(observations: Sequence[Observation]) -> Survival:
    """Estimates the survival curve and its median.

    A seed censored at a step still counts as at risk there. Shares are products of integer ratios, so that one of
    exactly 1/2 is one: products of floats miss it for 6, 8, 14 and other numbers of seeds.

    Raises:
      ValueError: there are no observations.
    """
    if not observations:
        raise ValueError("observations: expected at least one seed; found none")
    steps = sorted({one.step for one in observations if one.formed})
    share, greenwood = Fraction(1), Fraction(0)
    shares: list[Fraction] = []
    limits: list[tuple[float, float] | None] = []
    for step in steps:
        at_risk = sum(one.step >= step for one in observations)
        born = sum(one.formed and one.step == step for one in observations)
        share *= Fraction(at_risk - born, at_risk)
        if at_risk > born:
            greenwood += Fraction(born, at_risk * (at_risk - born))
        shares.append(share)
        limits.append(_log_log_limits(share, greenwood))
    half = Fraction(1, 2)
    return Survival(
        steps=tuple(steps),
        shares=tuple(map(float, shares)),
        low=tuple(None if pair is None else pair[0] for pair in limits),
        high=tuple(None if pair is None else pair[1] for pair in limits),
        median=next((step for step, own in zip(steps, shares, strict=True) if own <= half), None),
        median_low=_first_at_most_half(steps, shares, [None if pair is None else pair[0] for pair in limits]),
        median_high=_first_at_most_half(steps, shares, [None if pair is None else pair[1] for pair in limits]),
        formed=sum(one.formed for one in observations),
        total=len(observations),
    )


def _log_log_limits(share: Fraction, greenwood: Fraction) -> tuple[float, float] | None:
    if not 0 < share < 1:
        return None
    log_share = math.log(share)
    width = _QUANTILE * math.sqrt(greenwood) / abs(log_share)
    return float(share) ** math.exp(width), float(share) ** math.exp(-width)


def _first_at_most_half(steps: Sequence[int], shares: Sequence[Fraction], limits: Sequence[float | None]) -> int | None:
    """Finds the first step at which a limit of the share is at most 1/2 (Brookmeyer and Crowley 1982).

    A share of 0 has no limits, so that an upper end at that step is unknown.
    """
    for step, share, limit in zip(steps, shares, limits, strict=True):
        if limit is not None and limit <= 0.5:
            return step
        if limit is None and share == 0:
            return None
    return None
