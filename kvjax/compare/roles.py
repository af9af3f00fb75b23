"""Scores the roles of heads in a swept run: binder, retriever and writer (docs/definitions.md, "Roles")."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from kvjax.compare.aligned import SweptRun
from kvjax.compare.matching import RoleEvidence
from kvjax.measure.registry import ALL_SPLITS
from kvjax.model.components import Component, all_heads
from kvjax.story.confirmations import patched_windows

# Role -> the attention that shows it; a writer shows by what it adds to the answer's logit.
ATTENTION = {
    "binder": "head_binding_attention",
    "retriever": "head_current_value_attention",
    "writer": "head_direct_logit_attribution",
}

# Role -> the kinds of pairs under which patching the head must matter.
PAIR_KINDS = {"binder": ("swap",), "retriever": ("value", "stale"), "writer": ("value",)}

ROLES = tuple(ATTENTION)


@dataclasses.dataclass(frozen=True)
class RoleTrajectories:
    """The evidence for roles in one run at every checkpoint.

    Attributes:
      steps: [C].
      heads: X of them, layer by layer.
      attention: role -> [C, X] in [0, 1].
      drops: [C, X], what each head's ablation costs; it stands for the effect of every role where nothing was patched.
      recoveries: role -> [C, X], what patching each head recovers; NaN at checkpoints that are not patched.
    """

    steps: np.ndarray
    heads: tuple[Component, ...]
    attention: Mapping[str, np.ndarray]
    drops: np.ndarray
    recoveries: Mapping[str, np.ndarray]

    @property
    def layers(self) -> np.ndarray:
        return np.array([head.layer for head in self.heads])

    @property
    def patched_steps(self) -> list[int]:
        """The checkpoints that are patched with every kind of pair that a role asks for."""
        known = np.isfinite(np.stack(list(self.recoveries.values()))).any(axis=2).all(axis=0)
        return self.steps[known].tolist()

    def over(self, steps: Sequence[int], *, patched: bool) -> RoleEvidence:
        """Averages the evidence over some checkpoints.

        Args:
          steps: of the checkpoints.
          patched: whether effects are recoveries by patching, known at all of them; else they are drops by ablation.
        """
        inside = np.isin(self.steps, list(steps))
        effects = self.recoveries if patched else dict.fromkeys(ROLES, self.drops)
        return RoleEvidence(
            {role: _mean(values, inside) for role, values in self.attention.items()},
            {role: _mean(values, inside) for role, values in effects.items()},
        )


def role_trajectories(one: SweptRun) -> RoleTrajectories:
    """Collects the evidence for roles from a run's sweep and its activation patching.

    Raises:
      InputError: a result is missing or damaged.
    """
    metrics = one.results.metrics.sel(split=ALL_SPLITS)
    steps = metrics["step"].values
    heads = all_heads(metrics.sizes["layer"], metrics.sizes["head"])
    attention = {role: _flat(metrics[name]) for role, name in ATTENTION.items()}
    attention["writer"] = _share_of_positive(attention["writer"], metrics["mlp_direct_logit_attribution"].values)
    drops = _flat(metrics["head_accuracy_drop"].sel(ablation=one.results.sweep.ranked_by))
    recovered = _recoveries(one, heads)
    recoveries = {role: _at_steps(recovered, PAIR_KINDS[role], steps, len(heads)) for role in ROLES}
    return RoleTrajectories(steps, heads, attention, drops, recoveries)


def _flat(values: xr.DataArray) -> np.ndarray:
    """Orders [step, layer, head] as [C, X]."""
    ordered = values.transpose("step", "layer", "head").values
    return ordered.reshape(len(ordered), -1)


def _share_of_positive(heads_CxX: np.ndarray, mlps_CxL: np.ndarray) -> np.ndarray:
    """Divides each head's positive attribution by that of all heads and MLPs; 0 if nothing is positive."""
    positive = np.maximum(np.concatenate([heads_CxX, mlps_CxL], axis=1), 0.0)
    total = positive.sum(axis=1, keepdims=True)
    shares = np.divide(positive, total, out=np.zeros_like(positive), where=total > 0)
    return shares[:, : heads_CxX.shape[1]]


def _recoveries(one: SweptRun, heads: Sequence[Component]) -> dict[tuple[str, int], np.ndarray]:
    """Reads each head's recovery at all positions together, denoising: (kind of pair, step) -> [X].

    Where the clean run fails on a kind of pair, the run has nothing to recover, and no head has an effect.
    """
    found = {}
    for recovery in patched_windows(one.results)[0]:
        estimates = recovery.sel(statistic="estimate", place=[str(head) for head in heads])
        for kind in estimates["pair_kind"].values.tolist():
            for step in estimates["step"].values.tolist():
                found[kind, step] = np.nan_to_num(estimates.sel(pair_kind=kind, step=step).values)
    return found


def _at_steps(
    recovered: Mapping[tuple[str, int], np.ndarray], kinds: Sequence[str], steps: np.ndarray, count: int
) -> np.ndarray:
    """Averages recoveries over kinds of pairs at each step, [C, X]; NaN unless all of the kinds are patched there."""
    unknown = np.full(count, np.nan)
    return np.stack(
        [np.mean([recovered.get((kind, step), unknown) for kind in kinds], axis=0) for step in steps.tolist()]
    )


def _mean(values_CxX: np.ndarray, inside_C: np.ndarray) -> np.ndarray:
    """Averages over checkpoints; those at which no head has a value are left out."""
    own = values_CxX[inside_C]
    known = np.isfinite(own).any(axis=1)
    return own[known].mean(axis=0) if known.any() else np.full(own.shape[1], np.nan)
