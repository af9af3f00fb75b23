"""The residual stream's labelled means: trained probes with their nulls, drift of states, similarity of geometry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import xarray as xr

from kvjax.execution.fit_set import PROBE_TARGETS
from kvjax.measure.residual import cosine_drift
from kvjax.sweeps.probe_index import POSITION_ROLES, ProbeIndex, ratio
from kvjax.sweeps.state_similarity import OTHERS
from kvjax.task.vocabulary import PAD_ID

NULL_PERCENTILE = 95

_LOGISTIC = "accuracy of a multinomial logistic probe of the target"


class Put(Protocol):
    """Adds a variable whose first dimension is `step`."""

    def __call__(self, name: str, dims: Sequence[str], values: np.ndarray, long_name: str, units: str) -> None: ...


def put_probes(dataset: xr.Dataset, put: Put, arrays: Mapping[str, np.ndarray], probe: ProbeIndex) -> None:
    """Trained probes: accuracy and null by split, target, position and stage; the controls are labelled in `attrs`."""
    if f"probe/{PROBE_TARGETS[0]}" not in arrays:
        return
    dataset.coords["target"] = list(PROBE_TARGETS)
    is_read, in_split = probe.encoded.is_read, probe.split_weights()
    with_stale = is_read & (probe.encoded.stale_values != PAD_ID)
    counted = {"stale_value": with_stale, "current_vs_stale": with_stale}
    accuracies, nulls = {}, {}
    for target in (*PROBE_TARGETS, "current_vs_stale"):
        reads = in_split @ counted.get(target, is_read).sum(axis=1)
        right = np.einsum("cng,zn->czg", arrays[f"probe/{target}"].astype(np.float64), in_split)
        accuracies[target] = ratio(right, np.broadcast_to(reads[None, :, None], right.shape))
        own = arrays[f"null/{target}"].astype(np.float64)  # [C, permutations, splits, groups]
        permuted = np.concatenate([own.sum(axis=2, keepdims=True), own], axis=2)
        shares = ratio(permuted, np.broadcast_to(reads[None, None, :, None], permuted.shape))
        nulls[target] = np.percentile(shares, NULL_PERCENTILE, axis=1)

    def by_position(values: Mapping[str, np.ndarray]) -> np.ndarray:
        stacked = np.stack([values[target] for target in PROBE_TARGETS], axis=2)  # [C, splits, targets, 2 S]
        return stacked.reshape(*stacked.shape[:3], len(POSITION_ROLES), -1)

    dims = ("split", "target", "position_role", "stage")
    put("probe_accuracy", dims, by_position(accuracies), "accuracy of a trained ridge probe of the target", "1")
    put("probe_null", dims, by_position(nulls), "95th percentile of the accuracy with permuted fit labels", "1")
    dataset["probe_accuracy"].attrs["controls"] = (
        "query_key at prediction and value at support are the token that stands there: controls, not findings"
    )
    meaning = "share of reads whose value probe at p_e ranks the current value above the stale one; chance 0.5"
    put("probe_current_vs_stale", ("split", "stage"), accuracies["current_vs_stale"], meaning, "1")
    meaning = "95th percentile of that share with permuted fit labels"
    put("probe_current_vs_stale_null", ("split", "stage"), nulls["current_vs_stale"], meaning, "1")


def put_drift(put: Put, arrays: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray] | None) -> None:
    """Drift of the mean state at p_e and s_e, to the previous checkpoint and to the reference, by split and stage."""

    def with_all(state_sums_xZxSxD: np.ndarray) -> np.ndarray:
        return np.concatenate([state_sums_xZxSxD.sum(axis=-3, keepdims=True), state_sums_xZxSxD], axis=-3)

    to_previous, to_reference = [], []
    for role in POSITION_ROLES:
        states = with_all(arrays[f"state/{role}"])  # [C, splits, S, D]
        missing = np.full(states.shape[:3], np.nan)
        previous = missing.copy()
        previous[1:] = cosine_drift(states[1:], states[:-1])
        to_previous.append(previous)
        if reference is None:
            to_reference.append(missing)
        else:
            to_reference.append(cosine_drift(states, with_all(reference[f"state/{role}"])[None]))
    dims = ("split", "position_role", "stage")
    for name, values, other in (
        ("residual_drift", to_previous, "previous"),
        ("residual_drift_to_reference", to_reference, "reference"),
    ):
        meaning = f"1 - cosine of the mean state at p_e or s_e with that of the {other} checkpoint"
        put(name, dims, np.stack(values, axis=2), meaning, "1")


def put_movement(put: Put, moved: Sequence[Mapping[str, np.ndarray]], probe: ProbeIndex) -> None:
    """Drift of single events' states, and linear CKA, to the previous checkpoint and to the reference.

    Args:
      put: adds a variable.
      moved: of each checkpoint, as `measure_movement` returns them.
      probe: what the records are.
    """
    reads = probe.split_weights() @ probe.encoded.is_read.sum(axis=1)  # of all, and of each split
    for other, suffix in zip(OTHERS, ("", "_to_reference"), strict=True):
        sums = np.stack([one[f"event_drift/{other}"].astype(np.float64) for one in moved])  # [C, splits, 2 S]
        sums = np.concatenate([sums.sum(axis=1, keepdims=True), sums], axis=1)
        drift = ratio(sums, np.broadcast_to(reads[None, :, None], sums.shape))
        meaning = f"mean over reads of 1 - cosine of the state at p_e or s_e with that of the {other} checkpoint"
        by_position = drift.reshape(*drift.shape[:2], len(POSITION_ROLES), -1)
        put(f"residual_event_drift{suffix}", ("split", "position_role", "stage"), by_position, meaning, "1")
        cka = np.stack([one[f"cka/{other}"] for one in moved])
        meaning = f"linear CKA of the states of all reads with those of the {other} checkpoint"
        put(
            f"residual_cka{suffix}",
            ("position_role", "stage"),
            cka.reshape(len(cka), len(POSITION_ROLES), -1),
            meaning,
            "1",
        )


def put_logistic(
    dataset: xr.Dataset, put: Put, measured: Sequence[Mapping[str, np.ndarray] | None], probe: ProbeIndex
) -> None:
    """Accuracies of logistic probes, NaN for the checkpoints (None) that none was fitted for."""
    some = next((one for one in measured if one is not None), None)
    if some is None:
        return
    dataset.coords["target"] = list(PROBE_TARGETS)
    is_read, in_split = probe.encoded.is_read, probe.split_weights()
    with_stale = is_read & (probe.encoded.stale_values != PAD_ID)
    accuracies = []
    for target in PROBE_TARGETS:
        reads = in_split @ (with_stale if target == "stale_value" else is_read).sum(axis=1)
        missing = np.full(some[f"logistic/{target}"].shape, np.nan)
        right = np.stack([missing if one is None else one[f"logistic/{target}"] for one in measured])
        right = np.concatenate([right.sum(axis=1, keepdims=True), right], axis=1)
        accuracies.append(ratio(right, np.broadcast_to(reads[None, :, None], right.shape)))
    stacked = np.stack(accuracies, axis=2)  # [C, splits, targets, 2 S]
    by_position = stacked.reshape(*stacked.shape[:3], len(POSITION_ROLES), -1)
    put("logistic_probe_accuracy", ("split", "target", "position_role", "stage"), by_position, _LOGISTIC, "1")
