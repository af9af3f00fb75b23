"""Scores the roles of heads in a swept run: binder, retriever and writer (docs/definitions.md, "Roles")."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from kvjax.compare.aligned import SweptRun
from kvjax.compare.matching import RoleEvidence
from kvjax.intervene.metrics import DEFAULT_METRIC
from kvjax.measure.registry import ALL_SPLITS
from kvjax.model.components import Component, all_heads

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
      effects: role -> [C, X]; NaN at checkpoints where it was not measured.
      from_interventions: whether effects are recoveries by patching; else they are drops by ablation, alike for all
        roles.
    """

    steps: np.ndarray
    heads: tuple[Component, ...]
    attention: Mapping[str, np.ndarray]
    effects: Mapping[str, np.ndarray]
    from_interventions: bool

    @property
    def layers(self) -> np.ndarray:
        return np.array([head.layer for head in self.heads])

    def over(self, steps: Sequence[int]) -> RoleEvidence:
        """Averages the evidence over some checkpoints; those without a measured effect are left out of effects."""
        inside = np.isin(self.steps, list(steps))

        def mean(values_CxX: np.ndarray) -> np.ndarray:
            own = values_CxX[inside]
            known = np.isfinite(own).any(axis=1)
            return own[known].mean(axis=0) if known.any() else np.full(own.shape[1], np.nan)

        return RoleEvidence(
            {role: mean(values) for role, values in self.attention.items()},
            {role: mean(values) for role, values in self.effects.items()},
        )


def role_trajectories(one: SweptRun, *, interventions: bool) -> RoleTrajectories:
    """Collects the evidence for roles from a run's sweep, and from its interventions if asked for.

    Raises:
      InputError: a result is missing or damaged.
    """
    metrics = one.results.metrics.sel(split=ALL_SPLITS)
    steps = metrics["step"].values
    n_layers, n_heads = metrics.sizes["layer"], metrics.sizes["head"]
    heads = all_heads(n_layers, n_heads)
    attention = {role: _flat(metrics[name]) for role, name in ATTENTION.items()}
    attention["writer"] = _share_of_positive(attention["writer"], metrics["mlp_direct_logit_attribution"].values)
    drops = _flat(metrics["head_accuracy_drop"].sel(ablation=one.results.sweep.ranked_by))
    effects = dict.fromkeys(ROLES, drops)
    if interventions:
        recovered = _recoveries(one, heads)
        effects = {role: _at_steps(recovered, PAIR_KINDS[role], steps, len(heads)) for role in ROLES}
    return RoleTrajectories(steps, heads, attention, effects, interventions)


def has_interventions(one: SweptRun) -> bool:
    """Checks whether activation patching of a run was stored."""
    return bool(one.results.intervention_files("activation_patching"))


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
    """Reads each head's recovery at all positions together, denoising: (kind of pair, step) -> [X]."""
    found = {}
    for intervention in one.results.interventions("activation_patching"):
        recovery = intervention.dataset["recovery_by_role"].sel(
            statistic="estimate",
            direction="denoising",
            position_role="all",
            metric=DEFAULT_METRIC,
            place=[str(head) for head in heads],
        )
        for kind in recovery["pair_kind"].values.tolist():
            for step in recovery["step"].values.tolist():
                found[kind, step] = recovery.sel(pair_kind=kind, step=step).values
    return found


def _at_steps(
    recovered: Mapping[tuple[str, int], np.ndarray], kinds: Sequence[str], steps: np.ndarray, count: int
) -> np.ndarray:
    """Averages recoveries over kinds of pairs at each step, [C, X]; NaN where none was measured."""
    rows = np.full((len(steps), count), np.nan)
    for index, step in enumerate(steps.tolist()):
        own = [recovered[kind, step] for kind in kinds if (kind, step) in recovered]
        own = [values for values in own if np.isfinite(values).any()]
        if own:
            rows[index] = np.mean(own, axis=0)
    return rows
