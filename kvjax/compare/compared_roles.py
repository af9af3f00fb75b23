"""Compares the roles of heads between runs at a stage that they have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from kvjax.compare.aligned import SweptRun
from kvjax.compare.matching import Matching, Stability, match_runs, role_scores
from kvjax.compare.outliers import named_outliers, outliers
from kvjax.compare.roles import ROLES, RoleTrajectories, role_trajectories
from kvjax.compare.settings import LAST, LATEST_BIRTH
from kvjax.compare.stage import Stage, choose_stage
from kvjax.compare.variation import known_number
from kvjax.measure.statistics import ranking
from kvjax.model.components import Component

_NONE = -1  # stands for a head where no head has the role
_SCORE = "attention that shows the role, times the share of the causal effect"


def unpatched(runs: Sequence[SweptRun]) -> dict[str, Sequence[int]]:
    """Finds what has to be patched for roles to rest on patching at the latest birth that all runs have in common.

    Returns:
      The checkpoints that this birth rests on, of each run by name that is patched at none of them; nothing if the runs
      have no birth of an answer in common.

    Raises:
      InputError: a run lacks a result.
    """
    stage = choose_stage(runs, LATEST_BIRTH, {one.name: one.steps for one in runs})
    if stage.name == LAST:
        return {}
    patched = {one.name: role_trajectories(one).patched_steps for one in runs}
    return {name: steps for name, steps in stage.steps.items() if not set(steps) & set(patched[name])}


@dataclasses.dataclass(frozen=True)
class ComparedRoles:
    """The roles of several runs' heads, and how they match.

    Attributes:
      names: of the runs.
      trajectories: the evidence of each.
      stage: where they are compared.
      scores: [X, roles] of each run at the stage.
      free, within: matches of heads across layers, and within layers.
    """

    names: list[str]
    trajectories: list[RoleTrajectories]
    stage: Stage
    scores: list[np.ndarray]
    free: Matching
    within: Matching

    @classmethod
    def of(cls, runs: Sequence[SweptRun], *, stage: str, draws: int) -> ComparedRoles:
        """Scores and matches the heads of runs.

        Args:
          runs: at least two, of one shape.
          stage: where, as `choose_stage` takes it.
          draws: of the nulls.

        Raises:
          InputError: a run lacks a result, or has not come to the stage.
        """
        names, trajectories = [one.name for one in runs], [role_trajectories(one) for one in runs]
        patched = {name: own.patched_steps for name, own in zip(names, trajectories, strict=True)}
        chosen = choose_stage(runs, stage, patched)
        evidence = [
            own.over(chosen.steps[name], patched=chosen.patched) for name, own in zip(names, trajectories, strict=True)
        ]
        layers = trajectories[0].layers
        matched = [match_runs(evidence, layers, within_layers=within, draws=draws) for within in (False, True)]
        return cls(names, trajectories, chosen, [role_scores(x) for x in evidence], *matched)

    @property
    def heads(self) -> tuple[Component, ...]:
        return self.trajectories[0].heads

    def document(self) -> dict[str, Any]:
        """Describes winners and stabilities, ready for `RolesEntry`."""
        winners, first_RxO = {}, self._winners()
        for index, role in enumerate(ROLES):
            winners[role] = []
            for name, scores, first in zip(self.names, self.scores, first_RxO[:, index].tolist(), strict=True):
                best, second, *_ = [*scores[ranking(scores[:, index]), index].tolist(), 0.0]
                winner = None if first == _NONE else str(self.heads[first])
                winners[role].append({"run": name, "component": winner, "score": best, "second_score": second})
        return {
            "evidence": "interventions" if self.stage.patched else "ablation",
            "stage": self.stage.name,
            "stage_reason": self.stage.reason,
            "steps": {name: list(own) for name, own in self.stage.steps.items()},
            "winners": winners,
            "role_stability": _entry(self.free.similarity, "mean"),
            "address_stability": _entry(self.free.address, "mean"),
        }

    def matching(self) -> list[dict[str, Any]]:
        """Describes the match of every two runs, ready for `MatchEntry`."""
        return [
            {
                "run_a": self.names[a],
                "run_b": self.names[b],
                **self._match(self.free, a, b),
                "within_layers": self._match(self.within, a, b),
            }
            for a, b in self.free.pairs
        ]

    def _match(self, matching: Matching, a: int, b: int) -> dict[str, Any]:
        match, heads = matching.pairs[a, b], self.heads
        return {
            "heads": {str(heads[i]): str(heads[j]) for i, j in enumerate(match.heads.tolist())},
            "overlap": {str(heads[i]): value for i, value in enumerate(match.overlap.tolist())},
            "similarity": _entry(match.similarity, "observed"),
            "address": _entry(match.address, "observed"),
        }

    def _winners(self) -> np.ndarray:
        """Finds the head with the largest score of each role at the stage, int [runs, roles]; `_NONE` if all are 0."""
        found = [[int(ranking(own)[0]) if (own > 0).any() else _NONE for own in scores.T] for scores in self.scores]
        return np.array(found, int)

    def outliers(self) -> list[dict[str, Any]]:
        """Names runs whose roles are unlike the others', ready for `OutlierEntry`."""
        own: list[list[float]] = [[] for _ in self.names]
        for (a, b), match in self.free.pairs.items():
            own[a].append(match.similarity.observed)
            own[b].append(match.similarity.observed)
        means = [float(np.mean(values)) for values in own]
        what = "mean similarity of its heads' roles to the others'"
        return named_outliers(what, self.names, means, outliers(means))

    def dataset(self, steps: np.ndarray) -> xr.Dataset:
        """Labels role scores of all heads, at the stage and at common steps, and the trajectories of each winner.

        Trajectories rest on ablations, which are measured at every checkpoint, whatever the stage's scores rest on.
        """
        every = np.full((len(self.names), len(steps), len(self.heads), len(ROLES)), np.nan)
        for r, of_run in enumerate(self.trajectories):
            for s, step in enumerate(steps.tolist()):
                if step in of_run.steps:
                    every[r, s] = role_scores(of_run.over([step], patched=False))
        winner_RxO = self._winners()
        has_RxO = winner_RxO != _NONE
        followed = np.take_along_axis(every, winner_RxO[:, None, None, :], axis=2)[:, :, 0]  # [run, step, role]
        followed = np.where(has_RxO[:, None], followed, np.nan)
        names = [str(head) for head in self.heads]
        evidence = "recovery by patching" if self.stage.patched else "drop by ablation"
        found = xr.Dataset(
            {
                "role_score": (
                    ("run", "step", "component", "role"),
                    every,
                    {"units": "1", "long_name": f"{_SCORE} (drop by ablation)"},
                ),
                "role_stage_score": (
                    ("run", "component", "role"),
                    np.array(self.scores),
                    {"units": "1", "long_name": f"{_SCORE} ({evidence}), at the stage where runs are compared"},
                ),
                "role_winner": (
                    ("run", "role"),
                    np.where(has_RxO, np.array(names)[winner_RxO], ""),
                    {"long_name": "head with the largest score at the stage; empty if no head has the role"},
                ),
                "role_trajectory": (
                    ("run", "step", "role"),
                    followed,
                    {
                        "units": "1",
                        "long_name": "score of the role's winner, wherever it is; NaN if no head has the role",
                    },
                ),
            },
            coords={"run": self.names, "step": steps, "component": names, "role": list(ROLES)},
        )
        over = found["role_trajectory"]
        for name, reduced in (("mean", over.mean("run")), ("low", over.min("run")), ("high", over.max("run"))):
            words = {"mean": "mean", "low": "smallest", "high": "largest"}[name]
            found[f"role_trajectory_{name}"] = reduced.assign_attrs(
                units="1", long_name=f"{words} over the runs that have the role"
            )
        return found


def _entry(found: Stability, name: str) -> dict[str, Any]:
    null = {field: known_number(value) for field, value in dataclasses.asdict(found.null).items()}
    return {name: known_number(found.observed), "null": null}
