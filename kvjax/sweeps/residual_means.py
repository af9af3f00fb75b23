"""Measures of the residual stream that are no ratios of sums over sequences: nulls, drift, similarity of states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kvjax.measure.declarations.residual import PROBE_TARGETS
from kvjax.measure.residual import cosine_drift
from kvjax.measure.sequence_sums import Counting
from kvjax.sweeps.probe_index import POSITION_ROLES
from kvjax.sweeps.state_similarity import OTHERS

NULL_PERCENTILE = 95

_NEED_A_STALE_VALUE = ("stale_value", "current_vs_stale", "current_vs_stale_binary")


def probe_nulls(
    arrays: Mapping[str, np.ndarray], counting: Counting, members: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """Takes the 95th percentile of the accuracies of probes fitted on permuted labels; nothing without probes.

    Returns:
      `probe_null` [C, splits, targets, positions, S], `probe_current_vs_stale_null` [C, splits, S] and
      `probe_current_vs_stale_binary_null` [C, splits, positions, S].
    """
    if f"null/{PROBE_TARGETS[0]}" not in arrays:
        return {}

    def null(target: str) -> np.ndarray:
        right = arrays[f"null/{target}"].astype(np.float64)  # [C, permutations, splits, groups]
        permuted = np.concatenate([right.sum(axis=2, keepdims=True), right], axis=2)
        shares = _share(permuted, _scored(target, counting, members)[None, None, :, None])
        return np.percentile(shares, NULL_PERCENTILE, axis=1)

    return {
        "probe_null": _by_position(np.stack([null(target) for target in PROBE_TARGETS], axis=2)),
        "probe_current_vs_stale_null": null("current_vs_stale"),
        "probe_current_vs_stale_binary_null": _by_position(null("current_vs_stale_binary")),
    }


def logistic_accuracies(
    measured: Sequence[Mapping[str, np.ndarray] | None], counting: Counting, members: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """Forms the accuracies of logistic probes; nothing if no checkpoint has them.

    Returns:
      `logistic_probe_accuracy` [C, splits, targets, positions, S]; NaN for the checkpoints without probes.
    """
    fitted = next((of_checkpoint for of_checkpoint in measured if of_checkpoint is not None), None)
    if fitted is None:
        return {}
    accuracies = []
    for target in PROBE_TARGETS:
        name = f"logistic/{target}"
        missing = np.full(fitted[name].shape, np.nan)
        right = _with_all(np.stack([missing if checkpoint is None else checkpoint[name] for checkpoint in measured]))
        accuracies.append(_share(right, _scored(target, counting, members)[None, :, None]))
    return {"logistic_probe_accuracy": _by_position(np.stack(accuracies, axis=2))}


def drifts(arrays: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    """Measures how far the mean state has moved from the previous checkpoint's, and from the reference's.

    Returns:
      `residual_drift` and `residual_drift_to_reference` [C, splits, positions, S]; NaN without such a checkpoint.
    """
    to_previous, to_reference = [], []
    for role in POSITION_ROLES:
        states = _with_all(arrays[f"state/{role}"])  # [C, splits, S, D]
        missing = np.full(states.shape[:3], np.nan)
        previous = missing.copy()
        previous[1:] = cosine_drift(states[1:], states[:-1])
        to_previous.append(previous)
        if reference is None:
            to_reference.append(missing)
        else:
            to_reference.append(cosine_drift(states, _with_all(reference[f"state/{role}"][None])))
    return {
        "residual_drift": np.stack(to_previous, axis=2),
        "residual_drift_to_reference": np.stack(to_reference, axis=2),
    }


def movements(
    moved: Sequence[Mapping[str, np.ndarray]], counting: Counting, members: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """Forms the drift of single events' states and linear CKA, to the previous checkpoint and to the reference.

    Args:
      moved: of each checkpoint, see `compare_consecutive`.
      counting, members: reads, and the sequences of all and of each split.

    Returns:
      `residual_event_drift…` and `residual_cka…` [C, splits, positions, S].
    """
    reads = _scored(None, counting, members)
    found = {}
    for other, suffix in zip(OTHERS, ("", "_to_reference"), strict=True):
        sums = _with_all(np.stack([of_checkpoint[f"event_drift/{other}"] for of_checkpoint in moved]))
        found[f"residual_event_drift{suffix}"] = _by_position(_share(sums, reads[None, :, None]))
        found[f"residual_cka{suffix}"] = _by_position(
            np.stack([of_checkpoint[f"split_cka/{other}"] for of_checkpoint in moved])
        )
    return found


def _scored(target: str | None, counting: Counting, members: Sequence[np.ndarray]) -> np.ndarray:
    """Counts the reads that a probe target is scored on, [splits]."""
    counts = counting.counts["stale" if target in _NEED_A_STALE_VALUE else "reads"]
    return np.array([counts[own].sum() for own in members])


def _share(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    counts = np.broadcast_to(counts, sums.shape)
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts != 0)


def _with_all(sums_CxZxX: np.ndarray) -> np.ndarray:
    """Puts the sum over all splits before those of the splits, in float64."""
    sums = sums_CxZxX.astype(np.float64)
    return np.concatenate([sums.sum(axis=1, keepdims=True), sums], axis=1)


def _by_position(values_xG: np.ndarray) -> np.ndarray:
    """Tells positions from stages: [..., 2 S] to [..., 2, S]."""
    return values_xG.reshape(*values_xG.shape[:-1], len(POSITION_ROLES), -1)
