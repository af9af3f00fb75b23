"""Forms recoveries with intervals from the metric of every pair (docs/definitions.md, "Interventions")."""

from __future__ import annotations

import dataclasses

import numpy as np

from kvjax.measure.uncertainty import percentile_interval, resample_counts, resampled_ratios
from kvjax.task.corruption import PAIR_KINDS
from kvjax.task.pair_encoding import EncodedPairs

STATISTICS = ("estimate", "low", "high")

RESAMPLE_SEED = 0


@dataclasses.dataclass(frozen=True)
class PairGroups:
    """The pairs of each kind, the reads that each counts, and the resamples that all intervals share.

    Attributes:
      members: the indices of the pairs of each kind; kinds without pairs are left out.
      reads_N: affected reads of each pair.
      counts_KxN: how often each pair is drawn in each resample, within its kind.
    """

    members: dict[str, np.ndarray]
    reads_N: np.ndarray
    counts_KxN: np.ndarray

    @classmethod
    def of(cls, encoded: EncodedPairs) -> PairGroups:
        """Groups encoded pairs and draws the resamples."""
        members = {kind: np.flatnonzero(encoded.kinds == index) for index, kind in enumerate(PAIR_KINDS)}
        return cls(
            {kind: own for kind, own in members.items() if len(own)},
            encoded.is_affected.sum(axis=1),
            resample_counts(encoded.kinds, seed=RESAMPLE_SEED),
        )

    @property
    def kinds(self) -> list[str]:
        return list(self.members)


def means_per_read(groups: PairGroups, sums_CxNxX: np.ndarray) -> np.ndarray:
    """Divides sums over each pair's reads by the reads: means with 95 % intervals, [3, kinds, C, *X]."""
    reads = np.broadcast_to(groups.reads_N.reshape(1, -1, *[1] * (sums_CxNxX.ndim - 2)), sums_CxNxX.shape)
    return np.stack([_ratio(groups, own, sums_CxNxX, reads) for own in groups.members.values()], axis=1)


def recoveries(
    groups: PairGroups, patched_CxNxX: np.ndarray, base_CxN: np.ndarray, source_CxN: np.ndarray
) -> np.ndarray:
    """Forms (patched - base) / (source - base) as ratios of means over affected reads, with 95 % intervals.

    Args:
      groups: kinds of pairs, and resamples.
      patched_CxNxX: the metric of every intervened run, summed over a pair's reads.
      base_CxN, source_CxN: of the two runs without intervention.

    Returns:
      [3, kinds, C, *X]: estimate, low, high; NaN if the interval of the denominator includes 0. Ends are NaN if a kind
      has a single pair.
    """
    extra = (1,) * (patched_CxNxX.ndim - 2)
    moved = patched_CxNxX - base_CxN.reshape(*base_CxN.shape, *extra)
    gap = (source_CxN - base_CxN).astype(np.float64)
    found = []
    for own in groups.members.values():
        # The denominator is made positive, so that resamples divide by numbers of one sign.
        sign = np.where(gap[:, own].sum(axis=1, keepdims=True) < 0, -1.0, 1.0)
        signed = (sign * gap).reshape(*gap.shape, *extra)
        ratio = _ratio(groups, own, moved * sign.reshape(-1, 1, *extra), np.broadcast_to(signed, moved.shape))
        _, low, high = _ratio(groups, own, gap, np.broadcast_to(groups.reads_N[None], gap.shape))
        undefined = (low <= 0) & (high >= 0)
        ratio[:, undefined] = np.nan
        found.append(ratio)
    return np.stack(found, axis=1)


def _ratio(groups: PairGroups, own: np.ndarray, sums: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Divides sums over some pairs, with the interval of the ratio: [3, C, *X]; a single pair has no resamples."""
    values, samples = resampled_ratios(groups.counts_KxN[:, own], sums[:, own], totals[:, own])
    ends = (end.reshape(values.shape) for end in percentile_interval(samples.reshape(len(samples), -1)))
    unknown = np.isnan(values) | (len(own) < 2)
    return np.stack([values, *(np.where(unknown, np.nan, end) for end in ends)])
