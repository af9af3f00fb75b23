"""Intervals of a sweep's means and of their changes, from what each sequence adds to them.

Sequences are resampled within splits, the same ones for all checkpoints and measures. Changes between checkpoints and
differences between measures are then paired (docs/definitions.md, "Dynamics").
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
from collections.abc import Mapping, Sequence

import numpy as np
import threadpoolctl
import xarray as xr

from kvjax.machine import available_cores
from kvjax.measure.sequence_sums import SequenceSums, all_sequence_sums
from kvjax.measure.uncertainty import DIFFERENCE_OF_RATES, Bounds, interval, resample_counts, resampled_ratios
from kvjax.sweeps.probe_index import ProbeIndex

STATISTICS = ("estimate", "low", "high")

INTERVAL_SEED = 0


Resampled = tuple[np.ndarray, np.ndarray]  # a mean [C, *X], and under each resample [J, C, *X]
LastResampled = dict[tuple[str, int], Resampled]  # of one checkpoint, by measure and place of the split


def build_intervals(
    arrays: Mapping[str, np.ndarray],
    steps: Sequence[int],
    probe: ProbeIndex,
    *,
    before: LastResampled | None = None,
) -> xr.Dataset:
    """Makes the 95 % interval of every mean that is declared to have one, and of its changes.

    Args:
      arrays: measured sums [C, N, …] by name, as for `build_dataset`.
      steps: the training steps, ascending.
      probe: the records.
      before: what an earlier call, for the checkpoints before these, left in it; filled for the next call. A checkpoint
        that was resampled twice, among different ones, could differ in its last bit.

    Returns:
      Variables named as in `build_dataset`, with a leading dimension `statistic`; and `<name>_change`, from the
      previous checkpoint, NaN for the run's first.
    """
    before = {} if before is None else before
    counts_JxN = resample_counts(probe.encoded.splits, seed=INTERVAL_SEED)
    counting = probe.counting(arrays)
    labels = {axis: labels for axis, labels in counting.labels.items() if axis != "margin_statistic"}
    dataset = xr.Dataset(
        coords={"statistic": list(STATISTICS), "step": list(steps), **labels},
        attrs={
            "conventions": "95 % percentile bootstrap over sequences, stratified by split, paired across steps; "
            "rates and differences of rates on which all sequences agree have Wilson bounds, and no rate's are "
            "narrower than Wilson's for independent trials of the same spread",
            "resamples": len(counts_JxN),
            "seed": INTERVAL_SEED,
        },
    )
    members_of = probe.members()
    variables = {}
    # Sorting resamples releases the interpreter lock. BLAS is kept to one thread, in the whole process, for its threads
    # would fight with these for the cores.
    pool = _threads(available_cores())
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        for sums in all_sequence_sums(arrays, counting):
            measure = sums.measure
            if not measure.interval:
                continue
            over = members_of if measure.by_split else members_of[:1]
            previous = [before.get((measure.name, place)) for place in range(len(over))]
            found = pool.map(functools.partial(_with_interval, sums, counts_JxN=counts_JxN), over, previous)
            levels, changes, last = zip(*found, strict=True)
            before |= {(measure.name, place): of_split for place, of_split in enumerate(last)}
            for name, ends in ((measure.name, levels), (f"{measure.name}_change", changes)):
                if measure.by_split:
                    variables[name] = (("statistic", "step", "split", *measure.own_axes), np.stack(ends, axis=2))
                else:
                    variables[name] = (("statistic", "step", *measure.own_axes), ends[0])
    return dataset.assign(variables)


@functools.cache
def _threads(number: int) -> concurrent.futures.ThreadPoolExecutor:
    """Keeps threads for all blocks of checkpoints, for malloc keeps memory back for every new thread."""
    return concurrent.futures.ThreadPoolExecutor(number)


os.register_at_fork(after_in_child=_threads.cache_clear)  # a forked child has none of its parent's threads


def _with_interval(
    one: SequenceSums, members: np.ndarray, previous: Resampled | None, *, counts_JxN: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Resampled]:
    """Estimates a mean over some sequences, and its changes, with the ends of their intervals: [3, C, *X] each.

    `previous` is the checkpoint before the first, None for none; the last one is returned for the next call.
    """
    values, samples = resampled_ratios(counts_JxN[:, members], *one.of_sequences(members))
    level = _ends(values, samples, len(members), one.bounds)
    last = values[-1:].copy(), samples[:, -1:].copy()
    if previous is not None:
        values = np.concatenate([previous[0], values])
        samples = np.concatenate([previous[1], samples], axis=1)
    changes = _ends(
        values[1:] - values[:-1],
        samples[:, 1:] - samples[:, :-1],
        len(members),
        one.bounds and DIFFERENCE_OF_RATES,
    )
    change = np.full(level.shape, np.nan)
    change[:, level.shape[1] - changes.shape[1] :] = changes
    return level, change, last


def _ends(values_X: np.ndarray, samples_JxX: np.ndarray, num_sequences: int, bounds: Bounds | None) -> np.ndarray:
    flat = samples_JxX.reshape(len(samples_JxX), -1)
    low, high = interval(values_X.reshape(-1), flat, num_sequences, bounds=bounds)
    return np.stack([values_X, low.reshape(values_X.shape), high.reshape(values_X.shape)])
