"""From the device's per-microbatch sums back to arrays in the probe set's own order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kvjax.task.encoding import Bucket

PER_BATCH = "state/"  # sums over a whole microbatch; everything else has a leading sequence axis
PER_READ = "read/"


def collect(
    outputs: Sequence[Mapping[str, np.ndarray]], buckets: Sequence[Bucket], num_records: int, num_reads: int
) -> dict[str, np.ndarray]:
    """Returns measured arrays with one row per record.

    Args:
      outputs: for each bucket, sums [C, microbatch, …] as `measure_checkpoints` returns them.
      buckets: the buckets, in the same order.
      num_records: N.
      num_reads: Q, the most reads a record has; per-read arrays are padded to it with NaN (or False).

    Returns:
      `state/…` arrays [C, …], summed over all records in float64; all others [C, N, …].
    """
    collected: dict[str, np.ndarray] = {}
    for output, bucket in zip(outputs, buckets, strict=True):
        real = bucket.indices >= 0
        for name, sums in output.items():
            if name.startswith(PER_BATCH):
                collected[name] = collected.get(name, 0.0) + sums.astype(np.float64).sum(axis=1)
                continue
            rows = sums.reshape(len(sums), -1, *sums.shape[3:])[:, real]
            if name.startswith(PER_READ):
                missing = num_reads - rows.shape[2]
                fill = False if rows.dtype == bool else np.nan
                rows = np.pad(rows, ((0, 0), (0, 0), (0, missing)), constant_values=fill)
            if name not in collected:
                collected[name] = np.empty((len(rows), num_records, *rows.shape[2:]), rows.dtype)
            collected[name][:, bucket.indices[real]] = rows
    return collected
