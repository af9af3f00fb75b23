"""Forms the sums over sequences that a sweep's means are ratios of; no other module forms them.

A mean, its interval, its trajectory over training and its value on a full split are made from the same sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from kvjax.measure import registry
from kvjax.measure.declaration import Measure
from kvjax.measure.uncertainty import DIFFERENCE_OF_RATES, RATE, Bounds, ratios

_BOUNDS = {"rate": RATE, "difference of rates": DIFFERENCE_OF_RATES}


@dataclasses.dataclass(frozen=True)
class Counting:
    """Denominators of means over N sequences of at most Q reads, and the labels of their axes.

    Attributes:
      is_read: bool [N, Q].
      counts: by `Counted`, [N] or [N, labels of the first axis].
      groups: by what a measure declares as its `groups`, the reads that each label holds, bool [labels, N, Q].
      labels: by axis, its labels.
    """

    is_read: np.ndarray
    counts: Mapping[str, np.ndarray]
    groups: Mapping[str, np.ndarray]
    labels: Mapping[str, Sequence[str]]


@dataclasses.dataclass(frozen=True)
class SequenceSums:
    """A mean as what each sequence adds to its two sides.

    Attributes:
      measure: its declaration; X are its axes.
      sums: [C, N, *X] summed over a sequence's reads or targets.
      counts: [1 or C, N], or with axes X, each of its length or 1: reads or targets that count.
    """

    measure: Measure
    sums: np.ndarray
    counts: np.ndarray

    @property
    def bounds(self) -> Bounds | None:
        """Bounds of a rate or of a difference of rates, else None."""
        return _BOUNDS.get(self.measure.kind)

    def of_sequences(self, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Takes both sides of some sequences, of equal rank, the sums in float64."""
        sums, counts = self.sums[:, members].astype(np.float64), self.counts[:, members]
        return sums, counts.reshape(*counts.shape, *[1] * (sums.ndim - counts.ndim))

    def means(self, members: np.ndarray) -> np.ndarray:
        """Divides the sums over some sequences, [C, *X]; NaN if nothing counts."""
        return ratios(*self.of_sequences(members))

    def totals(self, members: np.ndarray) -> np.ndarray:
        """Counts what the means over some sequences are divided by, [1 or C, …]."""
        return self.counts[:, members].sum(axis=1)


def all_sequence_sums(arrays: Mapping[str, np.ndarray], counting: Counting) -> Iterator[SequenceSums]:
    """Yields the sums of every declared measure whose arrays were measured, in the order of their declaration.

    Args:
      arrays: measured sums [C, N, …] by name, per read or per sequence.
      counting: what they are divided by.
    """
    for measure in registry.MEASURES:
        if measure.is_ratio and (sums := sequence_sums(measure, arrays, counting)) is not None:
            yield sums


def sequence_sums(measure: Measure, arrays: Mapping[str, np.ndarray], counting: Counting) -> SequenceSums | None:
    """Forms the sums of one measure, None if one of its arrays was not measured."""
    sources = source_names(measure, counting.labels)
    if not sources or any(source not in arrays for source in sources):
        return None
    if measure.level == "read":
        return SequenceSums(measure, *_over_reads(measure, arrays[sources[0]], counting))
    found = [arrays[source] for source in sources]
    if measure.counted == "measured":
        sums, counts = found
        return SequenceSums(measure, sums, counts)
    if measure.combine is not None:
        sums = measure.combine(*found)
    elif "ablation" in measure.own_axes:
        sums = np.stack(found, axis=2)
    else:
        (sums,) = found
    # An array that tells apart more than the measure does, such as token roles, is summed over.
    if extra := tuple(range(2 + len(measure.own_axes), sums.ndim)):
        sums = sums.sum(axis=extra, dtype=np.float64)
    if measure.lost_from is not None:
        clean = registry.declared(measure.lost_from)
        whole, _ = _over_reads(clean, arrays[clean.sources[0]], counting)
        sums = whole.reshape(*whole.shape, *[1] * (sums.ndim - whole.ndim)) - sums
    return SequenceSums(measure, sums, _counts(measure, counting))


def source_names(measure: Measure, labels: Mapping[str, Sequence[str]]) -> list[str]:
    """Lists the arrays a measure is formed from, for every measured kind of ablation if it has that axis."""
    if "ablation" not in measure.own_axes:
        return list(measure.sources)
    return [source.format(ablation=kind) for source in measure.sources for kind in labels.get("ablation", ())]


def _over_reads(measure: Measure, values_CxNxQ: np.ndarray, counting: Counting) -> tuple[np.ndarray, np.ndarray]:
    """Sums per-read values and the reads that have one over each sequence, by group if the measure has groups."""
    values = values_CxNxQ.astype(np.float64)
    counted = counting.is_read & ~np.isnan(values)
    values = np.where(counted, values, 0.0)
    if measure.groups is None:
        return values.sum(axis=-1), counted.sum(axis=-1).astype(np.float64)
    groups_AxNxQ = counting.groups[measure.groups].astype(np.float64)
    return tuple(np.einsum("cnq,anq->cna", x.astype(np.float64), groups_AxNxQ) for x in (values, counted))


def _counts(measure: Measure, counting: Counting) -> np.ndarray:
    """Takes what each sequence adds to a measure's denominator, [1, N] or [1, N, labels of its first axis]."""
    if isinstance(measure.counted, str):
        counts = counting.counts[measure.counted]
    else:
        counts = np.stack([counting.counts[counted] for counted in measure.counted], axis=1)
    return counts[None].astype(np.float64)
