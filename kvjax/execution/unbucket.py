"""Puts the devices' per-microbatch arrays back into the order of the records or pairs they were made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from kvjax.measure.declarations.components import DRAWS

PER_BATCH = ("state/", DRAWS)  # sums over a whole microbatch; everything else has a leading sequence axis
PER_READ = "read/"


class Bucketed(Protocol):
    """Records or pairs in microbatches; `indices` [microbatch * B] is the row that each came from, -1 for padding."""

    indices: np.ndarray


def unbucket(
    outputs: Sequence[Mapping[str, np.ndarray]],
    buckets: Sequence[Bucketed],
    num_records: int,
    *,
    num_reads: int = 0,
) -> dict[str, np.ndarray]:
    """Joins the arrays of all buckets, with one row per record.

    Args:
      outputs: for each bucket, arrays [C, microbatch, B, …], or [C, microbatch, …] under `PER_BATCH`.
      buckets: the buckets, in the same order.
      num_records: N.
      num_reads: the least number of reads that `PER_READ` arrays are padded to.

    Returns:
      `PER_BATCH` arrays [C, …], summed over all records in float64; all others [C, N, …]. An axis that is longer in
      another bucket is padded with NaN, or with 0 if the array is not of floats.
    """
    collected: dict[str, np.ndarray] = {}
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for output, bucket in zip(outputs, buckets, strict=True):
        real = bucket.indices >= 0
        for name, x in output.items():
            if name.startswith(PER_BATCH):
                collected[name] = collected.get(name, 0.0) + x.astype(np.float64).sum(axis=1)
            else:
                rows = x.reshape(len(x), -1, *x.shape[3:])[:, real]
                parts.setdefault(name, []).append((bucket.indices[real], rows))
    for name, of_buckets in parts.items():
        collected[name] = _in_order(of_buckets, num_records, num_reads if name.startswith(PER_READ) else 0)
    return collected


def _in_order(of_buckets: Sequence[tuple[np.ndarray, np.ndarray]], num_records: int, num_reads: int) -> np.ndarray:
    """Orders the rows of all buckets as the records, their third axis at least `num_reads` long."""
    longest = [max(sizes) for sizes in zip(*(rows.shape[2:] for _, rows in of_buckets), strict=True)]
    if longest:
        longest[0] = max(longest[0], num_reads)
    first = of_buckets[0][1]
    fill = np.nan if np.issubdtype(first.dtype, np.floating) else 0
    joined = np.full((len(first), num_records, *longest), fill, first.dtype)
    for indices, rows in of_buckets:
        joined[:, indices, *(slice(size) for size in rows.shape[2:])] = rows
    return joined
