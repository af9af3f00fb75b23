"""Measures what a run answers: accuracy by split, and by how far back the answer was written, with resamples."""

from __future__ import annotations

import dataclasses

import numpy as np
import xarray as xr

from kvjax.artifacts.story_schema import Change, Distance, Reach
from kvjax.measure.uncertainty import DIFFERENCE_OF_RATES, RATE, Bounds, interval, percentile_interval, resampled_ratios

DISTANCE = "tokens_since_support"

# Distances are joined until a group has this many reads and this share of the split's.
_FEWEST_READS = 20
_SMALLEST_PART = 0.03
# The reach ends where accuracy first falls below this part of that of the best distance.
_REACHED = 0.5


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One number per checkpoint, and the same under resamples of sequences.

    Attributes:
      values_C: the numbers.
      samples_JxC: under each resample.
      sequences: how many sequences were resampled.
      bounds: of a rate or a difference of rates.
    """

    values_C: np.ndarray
    samples_JxC: np.ndarray
    sequences: int
    bounds: Bounds

    def change(self, before: int, after: int) -> Change:
        """Compares two checkpoints, each resample with itself."""
        ends = [self.interval(c) for c in (before, after)]
        change = self.values_C[after] - self.values_C[before]
        moved = (self.samples_JxC[:, after] - self.samples_JxC[:, before])[:, None]
        low, high = interval(np.array([change]), moved, self.sequences, bounds=DIFFERENCE_OF_RATES)
        return Change(
            before=_number(self.values_C[before]),
            before_interval=ends[0],
            after=_number(self.values_C[after]),
            after_interval=ends[1],
            change=_number(change),
            interval=_ends(low[0], high[0]),
        )

    def interval(self, checkpoint: int) -> tuple[float, float] | None:
        """Forms the 95 % interval at a checkpoint; None if there is none."""
        values, samples = self.values_C[[checkpoint]], self.samples_JxC[:, [checkpoint]]
        low, high = interval(values, samples, self.sequences, bounds=self.bounds)
        return _ends(low[0], high[0])


@dataclasses.dataclass(frozen=True)
class Distances:
    """Accuracy of one split by how many tokens before its answer a read's support stands.

    Attributes:
      ranges: first and last distance of each of D groups, ascending.
      reads: how many reads each has.
      values_CxD: accuracy.
      samples_JxCxD: under resamples.
    """

    ranges: tuple[tuple[int, int], ...]
    reads: tuple[int, ...]
    values_CxD: np.ndarray
    samples_JxCxD: np.ndarray

    def reach(self, before: int, after: int, *, answers_C: np.ndarray) -> Reach:
        """Compares how far back reads are answered at two checkpoints; null where `answers_C` is false."""
        ends = [self._reach(c) if answers_C[c] else (None, None) for c in (before, after)]
        return Reach(
            before=ends[0][0],
            before_interval=ends[0][1],
            after=ends[1][0],
            after_interval=ends[1][1],
            longest=self.ranges[-1][1],
            distances=[
                Distance(
                    tokens=tokens,
                    reads=reads,
                    before=_number(self.values_CxD[before, d]),
                    after=_number(self.values_CxD[after, d]),
                )
                for d, (tokens, reads) in enumerate(zip(self.ranges, self.reads, strict=True))
            ],
        )

    def _reach(self, checkpoint: int) -> tuple[int | None, tuple[int, int] | None]:
        """Finds the longest distance that is reached at a checkpoint, and its interval."""
        (count,) = _reached(self.values_CxD[[checkpoint]])
        counts = _reached(self.samples_JxCxD[:, checkpoint])
        low, high = (self._end(int(np.percentile(counts, q, method="nearest"))) for q in (2.5, 97.5))
        return self._end(int(count)), None if low is None or high is None else (low, high)

    def _end(self, groups: int) -> int | None:
        return self.ranges[groups - 1][1] if groups else None


def _reached(values_KxD: np.ndarray) -> np.ndarray:
    """Counts the shortest distances, one after another, at which accuracy is at least half that of the best."""
    known = np.nan_to_num(values_KxD)
    best = known.max(axis=1, keepdims=True)
    at = (known >= _REACHED * best) & (best > 0)
    # Reads of a nearer group may be fewer and harder; the reach begins at the first group that is answered.
    begun = np.maximum.accumulate(at, axis=1)
    stopped = np.maximum.accumulate(begun & ~at, axis=1)
    last = at & ~stopped
    return np.where(last.any(axis=1), last.shape[1] - np.argmax(last[:, ::-1], axis=1), 0)


def split_accuracies(events: xr.Dataset, counts_JxN: np.ndarray) -> dict[str, Trajectory]:
    """Measures the accuracy of each split, in the order of the file."""
    right, reads = _right(events)
    splits = events["split"].values
    found = {}
    for split in dict.fromkeys(splits.tolist()):
        own = np.flatnonzero(splits == split)
        counts = reads[own].sum(axis=1, dtype=np.float64)[None]
        values, samples = resampled_ratios(counts_JxN[:, own], right[:, own].sum(axis=2), counts)
        found[split] = Trajectory(values, samples, len(own), RATE)
    return found


def whole_accuracy(events: xr.Dataset, counts_JxN: np.ndarray) -> Trajectory:
    """Measures the accuracy over the whole probe set."""
    right, reads = _right(events)
    values, samples = resampled_ratios(counts_JxN, right.sum(axis=2), reads.sum(axis=1, dtype=np.float64)[None])
    return Trajectory(values, samples, len(reads), RATE)


def accuracy_by_distance(events: xr.Dataset, counts_JxN: np.ndarray, split: str) -> Distances | None:
    """Measures the accuracy of a split by the distance of the support, or None if it has too few reads."""
    if DISTANCE not in events:
        return None
    right, reads = _right(events)
    own = np.flatnonzero(events["split"].values == split)
    right, reads, distances = right[:, own], reads[own], events[DISTANCE].values[own]
    ranges = _groups(distances[reads])
    if not ranges:
        return None
    values, samples, sizes = [], [], []
    for low, high in ranges:
        member = reads & (distances >= low) & (distances <= high)
        sums = np.where(member, right, 0.0).sum(axis=2)
        of_group = resampled_ratios(counts_JxN[:, own], sums, member.sum(axis=1, dtype=np.float64)[None])
        values.append(of_group[0])
        samples.append(of_group[1])
        sizes.append(int(member.sum()))
    return Distances(tuple(ranges), tuple(sizes), np.stack(values, axis=-1), np.stack(samples, axis=-1))


def _groups(distances_R: np.ndarray) -> list[tuple[int, int]]:
    """Joins neighbouring distances until each group has enough reads; the last joins the one before if it has not."""
    smallest = max(_FEWEST_READS, _SMALLEST_PART * len(distances_R))
    groups, begun, size = [], None, 0
    for distance, count in zip(*np.unique(distances_R, return_counts=True), strict=True):
        begun = int(distance) if begun is None else begun
        size += int(count)
        if size >= smallest:
            groups.append((begun, int(distance)))
            begun, size = None, 0
    if begun is not None and groups:
        groups[-1] = (groups[-1][0], int(distances_R.max()))
    return groups


def _right(events: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Takes the right answers [C, N, Q], 0 beyond a sequence's last read, and which positions are reads [N, Q]."""
    reads = events["is_read"].values.astype(bool)
    return np.where(reads, np.nan_to_num(events["read_correct"].values.astype(np.float64)), 0.0), reads


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _ends(low: float, high: float) -> tuple[float, float] | None:
    return (float(low), float(high)) if np.isfinite(low) and np.isfinite(high) else None


def share_change(values_C: np.ndarray, samples_JxC: np.ndarray, before: int, after: np.ndarray) -> Change:
    """Compares a share at a checkpoint with its mean over later ones; null if nothing carries the behaviour there."""
    samples = np.stack([samples_JxC[:, before], samples_JxC[:, after].mean(axis=1)], axis=1)
    values = values_C[before], values_C[after].mean()
    ends = np.stack(percentile_interval(samples), axis=1)
    moved = percentile_interval(samples[:, 1:] - samples[:, :1])
    return Change(
        before=_number(values[0]),
        before_interval=_ends(*ends[0]),
        after=_number(values[1]),
        after_interval=_ends(*ends[1]),
        change=_number(values[1] - values[0]),
        interval=_ends(moved[0][0], moved[1][0]),
    )
