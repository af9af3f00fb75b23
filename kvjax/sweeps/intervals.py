"""Intervals of a sweep's means and of their changes, from what each sequence adds to them.

Sequences are resampled within splits, the same ones for all checkpoints and measures, so that changes between
checkpoints and differences between measures are paired (docs/definitions.md, section 7).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import threadpoolctl
import xarray as xr

from kvjax.devices import available_cores
from kvjax.execution.fit_set import PROBE_TARGETS
from kvjax.measure.heads import ATTENTION_MEASURES
from kvjax.measure.uncertainty import DIFFERENCE_OF_RATES, RATE, Bounds, interval, resample_counts, resampled_ratios
from kvjax.model.sites import stage_names
from kvjax.sweeps.ablations import ABLATIONS
from kvjax.sweeps.probe_index import ALL_SPLITS, DIFFICULTIES, LENS_MEANS, POSITION_ROLES, READ_MEANS, ProbeIndex
from kvjax.task.encoding import RELATION_STALE, TOKEN_ROLES
from kvjax.task.vocabulary import PAD_ID

STATISTICS = ("estimate", "low", "high")

INTERVAL_SEED = 0


@dataclasses.dataclass(frozen=True)
class SequenceSums:
    """A mean over reads as what each sequence adds to its two sides.

    Attributes:
      name: of the mean in the sweep's dataset.
      dims: names of the axes X.
      sums: [C, N, *X] summed over a sequence's reads.
      counts: [1 or C, N], or with axes X, each of its length or 1: reads that count.
      bounds: of a rate or a difference of rates, else None.
      by_split: whether the dataset has it by split, or over the whole probe set alone.
    """

    name: str
    dims: tuple[str, ...]
    sums: np.ndarray
    counts: np.ndarray
    bounds: Bounds | None
    by_split: bool = True


def build_intervals(arrays: Mapping[str, np.ndarray], steps: Sequence[int], probe: ProbeIndex) -> xr.Dataset:
    """Returns estimate and 95 % interval of every accuracy, margin, attention measure and drop, and of their changes.

    Args:
      arrays: measured sums [C, N, …] by name, as for `build_dataset`.
      steps: the training steps, ascending.
      probe: what the records are.

    Returns:
      Variables named as in `build_dataset`, with a leading dimension `statistic`; and `<name>_change`, from the
      previous checkpoint, NaN for the first.
    """
    counts_KxN = resample_counts(probe.encoded.splits, seed=INTERVAL_SEED)
    n_layers = arrays["mlp/write_norm"].shape[-1]
    dataset = xr.Dataset(
        coords={
            "statistic": list(STATISTICS),
            "step": list(steps),
            "split": [ALL_SPLITS, *probe.splits],
            "stage": list(stage_names(n_layers)),
            "layer": np.arange(n_layers),
            "head": np.arange(arrays["head/query_attention"].shape[-1]),
            "ablation": _ablations(arrays),
            "position_role": list(POSITION_ROLES),
            "target": list(PROBE_TARGETS),
            "token_role": list(TOKEN_ROLES),
            "difficulty": list(DIFFICULTIES),
            "axis_value": [name for name, _ in probe.slices()],
        },
        attrs={
            "conventions": "95 % percentile bootstrap over sequences, stratified by split, paired across steps; "
            "rates and differences of rates on which all sequences agree have Wilson bounds, and no rate's are "
            "narrower than Wilson's for independent trials of the same spread",
            "resamples": len(counts_KxN),
            "seed": INTERVAL_SEED,
        },
    )
    members_of = [np.flatnonzero(member) for member in probe.split_weights()]
    variables = {}
    # Sorting resamples releases the interpreter lock. BLAS is kept to one thread, in the whole process, for its threads
    # would fight with these for the cores.
    with (
        threadpoolctl.threadpool_limits(1, user_api="blas"),
        concurrent.futures.ThreadPoolExecutor(available_cores()) as pool,
    ):
        for one in _sequence_sums(arrays, probe):
            over = members_of if one.by_split else members_of[:1]
            found = pool.map(functools.partial(_with_interval, one, counts_KxN=counts_KxN), over)
            levels, changes = zip(*found, strict=True)
            for name, ends in ((one.name, levels), (f"{one.name}_change", changes)):
                if one.by_split:
                    variables[name] = (("statistic", "step", "split", *one.dims), np.stack(ends, axis=2))
                else:
                    variables[name] = (("statistic", "step", *one.dims), ends[0])
    return dataset.assign(variables)


def _with_interval(one: SequenceSums, members: np.ndarray, counts_KxN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns estimate, low and high of a mean over some sequences, and of its changes: [3, C, *X] each."""
    sums = one.sums[:, members].astype(np.float64)
    counts = one.counts[:, members]
    counts = counts.reshape(*counts.shape, *[1] * (sums.ndim - counts.ndim))
    values, samples = resampled_ratios(counts_KxN[:, members], sums, counts)
    level = _ends(values, samples, len(members), one.bounds)
    change = np.full((len(STATISTICS), *values.shape), np.nan)
    bounds = one.bounds and DIFFERENCE_OF_RATES
    change[:, 1:] = _ends(values[1:] - values[:-1], samples[:, 1:] - samples[:, :-1], len(members), bounds)
    return level, change


def _ends(values_X: np.ndarray, samples_KxX: np.ndarray, num_sequences: int, bounds: Bounds | None) -> np.ndarray:
    flat = samples_KxX.reshape(len(samples_KxX), -1)
    low, high = interval(values_X.reshape(-1), flat, num_sequences, bounds=bounds)
    return np.stack([values_X, low.reshape(values_X.shape), high.reshape(values_X.shape)])


def _ablations(arrays: Mapping[str, np.ndarray]) -> list[str]:
    return [kind for kind in ABLATIONS if f"head/{kind}/correct" in arrays]


def _sequence_sums(arrays: Mapping[str, np.ndarray], probe: ProbeIndex) -> Iterator[SequenceSums]:
    is_read = probe.encoded.is_read
    reads = is_read.sum(axis=1)[None].astype(np.float64)
    clean = {}
    for name, (source, _, _) in READ_MEANS.items():
        values = arrays[source].astype(np.float64)
        counted = is_read & ~np.isnan(values)
        sums = np.where(counted, values, 0.0).sum(axis=-1)
        clean[name] = sums
        yield SequenceSums(name, (), sums, counted.sum(axis=-1), RATE if name == "answer_accuracy" else None)
    correct = arrays["read/correct"] & is_read
    for name, dim, groups in (
        ("slice_accuracy", "axis_value", [member for _, member in probe.slices()]),
        ("difficulty_accuracy", "difficulty", [(probe.difficulty == tag)[:, None] & is_read for tag in DIFFICULTIES]),
    ):
        members = np.stack(groups)  # [groups, N, Q]
        right = np.einsum("cnq,anq->cna", correct.astype(np.float64), members.astype(np.float64))
        counted = members.sum(axis=2).T[None].astype(np.float64)
        yield SequenceSums(name, (dim,), right, counted, RATE, by_split=False)
    right, targets = arrays["token/role_correct"].astype(np.float64), probe.targets_by_role()[None]
    yield SequenceSums("token_role_accuracy", ("token_role",), right, targets, RATE)
    yield SequenceSums("token_accuracy", (), right.sum(axis=-1), targets.sum(axis=-1), RATE)
    for name, (source, _, units) in LENS_MEANS.items():
        yield SequenceSums(name, ("stage",), arrays[source], reads, RATE if units == "1" else None)
    with_stale = (probe.encoded.relations == RELATION_STALE).any(axis=2).sum(axis=1)[None]
    for name in ATTENTION_MEASURES:
        counted = with_stale if name == "stale_attention" else reads
        yield SequenceSums(f"head_{name}", ("layer", "head"), arrays[f"head/{name}"], counted, None)
    for component, axes in (("head", ("layer", "head")), ("mlp", ("layer",))):
        for measure, source, bounds in (("accuracy", "correct", DIFFERENCE_OF_RATES), ("margin", "margin", None)):
            whole = clean[f"answer_{measure}"]
            whole = whole.reshape(*whole.shape, *[1] * len(axes))
            lost = [whole - arrays[f"{component}/{kind}/{source}"] for kind in _ablations(arrays)]
            yield SequenceSums(
                f"{component}_{measure}_drop", ("ablation", *axes), np.stack(lost, axis=2), reads, bounds
            )
    yield from _probe_sums(arrays, probe, reads)


def _probe_sums(arrays: Mapping[str, np.ndarray], probe: ProbeIndex, reads_1xN: np.ndarray) -> Iterator[SequenceSums]:
    if f"probe/{PROBE_TARGETS[0]}" not in arrays:
        return
    with_stale = (probe.encoded.is_read & (probe.encoded.stale_values != PAD_ID)).sum(axis=1)[None].astype(np.float64)
    right = np.stack([arrays[f"probe/{target}"] for target in PROBE_TARGETS], axis=2)  # [C, N, targets, 2 S]
    right = right.reshape(*right.shape[:3], len(POSITION_ROLES), -1)
    counted = np.stack([with_stale if target == "stale_value" else reads_1xN for target in PROBE_TARGETS], axis=2)
    yield SequenceSums("probe_accuracy", ("target", "position_role", "stage"), right, counted, RATE)
    current = arrays["probe/current_vs_stale"]
    yield SequenceSums("probe_current_vs_stale", ("stage",), current, with_stale, RATE)
