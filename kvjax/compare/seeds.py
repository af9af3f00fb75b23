"""Compares runs that differ in their seed: what repeats, what varies, and which heads have the same role."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from kvjax.artifacts.provenance import software_versions
from kvjax.artifacts.tables import SCHEMA_VERSION
from kvjax.compare import events
from kvjax.compare.aligned import Aligned, SweptRun, align, check_comparable
from kvjax.compare.matching import Matching, Stability, match_runs, role_scores
from kvjax.compare.order import consensus_order, precedences
from kvjax.compare.outliers import outliers, outlying_stretches
from kvjax.compare.roles import ROLES, RoleTrajectories, has_interventions, role_trajectories
from kvjax.compare.settings import CompareSettings
from kvjax.compare.variation import seed_spread
from kvjax.measure.registry import ALL_SPLITS, BIRTH_SPLIT
from kvjax.measure.statistics import ranking
from kvjax.model.components import Component

LEADERS = 5  # components that are listed of each run
_PERSISTENCE = 2  # further checkpoints at which a trajectory must stand apart


@dataclasses.dataclass(frozen=True)
class SeedComparison:
    """What a comparison found.

    Attributes:
      document: ready for `Comparison`, but for its arrays' hash and the sentences.
      dataset: every measure at common steps, [run, step, …], and the roles' scores and trajectories.
    """

    document: dict[str, Any]
    dataset: xr.Dataset


def compare(runs: Sequence[SweptRun], settings: CompareSettings) -> SeedComparison:
    """Compares swept runs with birth windows.

    Raises:
      InputError: a run lacks a result or has a damaged one, or the runs cannot stand side by side.
    """
    notes = check_comparable(runs, allow_other_probe_sets=settings.allow_other_probe_sets)
    aligned = align(runs, settings.align)
    best = {one.name: best_step(one) for one in runs}
    evidence = _Evidence.of(runs, best, draws=settings.null_draws)
    pairs = precedences(events.onsets(runs))
    order = [dataclasses.asdict(pair) | {"holds": pair.holds} for pair in pairs]
    metrics = list(dict.fromkeys(name for pair in pairs for name in (pair.first, pair.second)))
    accuracy = accuracies(runs, best)
    happened = {
        "births": events.births(runs),
        "half_rises": events.half_rises(runs),
        "stabilization": events.stabilization(runs),
    }
    document = {
        "schema_version": SCHEMA_VERSION,
        "runs": [_described(one, best[one.name]) for one in runs],
        "alignment": {
            "how": settings.align,
            "steps": aligned.dataset["step"].values.tolist(),
            "notes": aligned.notes,
        },
        **happened,
        "order": {"pairs": order, "consensus": consensus_order(metrics, pairs)},
        "story": {one.name: _story(one) for one in runs},
        "leaders": [leaders(one, best[one.name]) for one in runs],
        "accuracy": accuracy,
        "probes": _probes(runs, best),
        "roles": evidence.document(),
        "matching": evidence.matches(),
        "outliers": [
            *_outlying_events(happened),
            *_outlying_numbers(accuracy),
            *_outlying_trajectories(aligned),
            *evidence.outliers(),
        ],
        "notes": [*notes, *_unfinished(runs), *aligned.notes, *evidence.notes],
        "settings": settings.recorded,
        "versions": software_versions(),
    }
    return SeedComparison(document, aligned.dataset.merge(evidence.dataset(aligned.dataset["step"].values)))


def _unfinished(runs: Sequence[SweptRun]) -> list[str]:
    names = [one.name for one in runs if not one.run.complete]
    what = "half-rises and stability of unfinished runs are to their last checkpoint, and may change"
    return [f"{what}: {', '.join(names)}"] if names else []


def best_step(one: SweptRun) -> int:
    """Finds the measured checkpoint with the highest accuracy on `validation_iid`, or on all splits without it."""
    metrics = one.results.metrics["answer_accuracy"]
    split = BIRTH_SPLIT if BIRTH_SPLIT in metrics["split"].values else ALL_SPLITS
    values = metrics.sel(split=split)
    return int(values["step"].values[int(values.values.argmax())])


def _described(one: SweptRun, best: int) -> dict[str, Any]:
    run, sweep = one.run, one.results.sweep
    sweep_sha256, story_sha256 = one.made_from
    return {
        "name": one.name,
        "path": str(run.path),
        "seed": run.config.seed,
        "steps": one.steps,
        "planned_steps": run.planned_steps,
        "complete": run.complete,
        "best_step": best,
        "sweep_sha256": sweep_sha256,
        "probe_set_sha256": sweep.probe_set.content_sha256,
        "story_sha256": story_sha256,
    }


def _story(one: SweptRun) -> dict[str, Any]:
    """Takes the phases and handovers of a run's story."""
    story = one.results.story.model_dump(mode="json", by_alias=True)
    return {"phases": story["phases"], "handovers": story["handovers"]}


def leaders(one: SweptRun, step: int) -> dict[str, Any]:
    """Lists the leading components of a run at a checkpoint, ready for `RunLeaders`."""
    kind = one.results.sweep.ranked_by
    metrics = one.results.metrics.sel(split=ALL_SPLITS, step=step)
    found: dict[str, Any] = {"run": one.name, "step": step, "ranked_by": kind}
    for field, name in (("heads", "head_accuracy_drop"), ("mlps", "mlp_accuracy_drop")):
        drops = metrics[name].sel(ablation=kind)
        flat = drops.values.reshape(-1)
        at = [Component(*map(int, np.unravel_index(index, drops.shape))) for index in ranking(flat)[:LEADERS]]
        found[field] = [
            {"component": str(component), "accuracy_drop": _number(flat[index])}
            for component, index in zip(at, ranking(flat)[:LEADERS], strict=True)
        ]
    return found


def accuracies(runs: Sequence[SweptRun], best: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Summarises accuracy on each split at each run's best and last checkpoint, ready for `SpreadEntry`."""
    found: dict[str, dict[str, Any]] = {}
    for split in runs[0].results.metrics["split"].values.tolist():
        found[split] = {}
        for when in ("best", "last"):
            values, errors = {}, {}
            for one in runs:
                metrics = one.results.metrics["answer_accuracy"]
                if split not in metrics["split"].values:
                    values[one.name] = errors[one.name] = None
                    continue
                step = best[one.name] if when == "best" else one.steps[-1]
                values[one.name] = _number(metrics.sel(split=split, step=step).values)
                ends = one.results.intervals["answer_accuracy"].sel(split=split, step=step)
                low, high = (float(ends.sel(statistic=end)) for end in ("low", "high"))
                errors[one.name] = (high - low) / (2 * 1.959964)
            found[split][when] = _spread(values, list(errors.values()))
    return found


def _probes(runs: Sequence[SweptRun], best: Mapping[str, int]) -> dict[str, Any]:
    """Summarises each trained probe at its best stage, at each run's best checkpoint."""
    if any("probe_accuracy" not in one.results.metrics for one in runs):
        return {}
    found = {}
    accuracy = runs[0].results.metrics["probe_accuracy"]
    for target in accuracy["target"].values.tolist():
        for role in accuracy["position_role"].values.tolist():
            values = {}
            for one in runs:
                own = one.results.metrics["probe_accuracy"].sel(
                    split=ALL_SPLITS, step=best[one.name], target=target, position_role=role
                )
                values[one.name] = _number(np.nanmax(own.values)) if np.isfinite(own.values).any() else None
            found[f"{target} at {role}"] = _spread(values)
    return found


def _spread(values: Mapping[str, float | None], errors: Sequence[float | None] | None = None) -> dict[str, Any]:
    spread = seed_spread(list(values.values()), errors)
    numbers = dict.fromkeys(("median", "low", "high", "deviation", "sampling_share"))
    if spread is not None:
        numbers = {name: getattr(spread, name) for name in numbers}
    return {"values": dict(values), **numbers}


def _outlying_events(happened: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Names runs that reached something far before or after all others, or alone did not."""
    found = []
    words = {"births": "birth of", "half_rises": "half-rise of", "stabilization": "stabilization of"}
    for family, entries in happened.items():
        for name, entry in entries.items():
            own, what = entry["runs"], f"{words[family]} {name}"
            steps = [one["step"] if one["formed"] else None for one in own]
            found += _named(what, [one["run"] for one in own], steps, outliers(steps))
            missing = [i for i, one in enumerate(own) if not one["formed"]]
            if len(missing) == 1 and len(own) > 3:
                known = [step for step in steps if step is not None]
                if own[missing[0]]["step"] > max(known):  # else it may still come as late as the others'
                    found += _named(what, [one["run"] for one in own], steps, missing)
    return found


def _outlying_numbers(accuracy: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for split, at in accuracy.items():
        for when, entry in at.items():
            names, values = list(entry["values"]), list(entry["values"].values())
            found += _named(f"accuracy on {split} at its {when} checkpoint", names, values, outliers(values))
    return found


def _outlying_trajectories(aligned: Aligned) -> list[dict[str, Any]]:
    accuracy = aligned.dataset["answer_accuracy"].transpose("run", "step", "split")
    steps, names = accuracy["step"].values, accuracy["run"].values.tolist()
    found = []
    for split in accuracy["split"].values.tolist():
        values = accuracy.sel(split=split).values
        for index, first, last in outlying_stretches(values, persistence=_PERSISTENCE):
            middle = (first + last) // 2
            what = f"accuracy on {split} from step {steps[first]} to {steps[last]} (at {steps[middle]})"
            found += _named(what, names, values[:, middle].tolist(), [index])
    return found


def _named(
    what: str, names: Sequence[str], values: Sequence[float | None], indices: Sequence[int]
) -> list[dict[str, Any]]:
    rows = []
    for index in indices:
        others = [value for i, value in enumerate(values) if i != index and value is not None and np.isfinite(value)]
        rows.append(
            {
                "run": names[index],
                "what": what,
                "found": _number(values[index]),
                "others_low": min(others, default=None),
                "others_high": max(others, default=None),
            }
        )
    return rows


def _number(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


@dataclasses.dataclass(frozen=True)
class _Evidence:
    """The roles of several runs' heads, and how they match.

    Attributes:
      names: of the runs.
      trajectories: the evidence of each.
      steps: the checkpoints of each that scores are averaged over.
      scores: [X, roles] of each.
      free, within: matches of heads across layers, and within layers.
      notes: what a reader should know.
    """

    names: list[str]
    trajectories: list[RoleTrajectories]
    steps: list[list[int]]
    scores: list[np.ndarray]
    free: Matching
    within: Matching
    notes: list[str]

    @classmethod
    def of(cls, runs: Sequence[SweptRun], best: Mapping[str, int], *, draws: int) -> _Evidence:
        patched = [has_interventions(one) for one in runs]
        notes = []
        if any(patched) and not all(patched):
            without = ", ".join(one.name for one, has in zip(runs, patched, strict=True) if not has)
            notes.append(f"roles rest on ablations alone, for these runs have no activation patching: {without}")
        trajectories = [role_trajectories(one, interventions=all(patched)) for one in runs]
        steps = [_phase_steps(one, of_run, best[one.name]) for one, of_run in zip(runs, trajectories, strict=True)]
        evidence = [of_run.over(own) for of_run, own in zip(trajectories, steps, strict=True)]
        layers = trajectories[0].layers
        matched = [match_runs(evidence, layers, within_layers=within, draws=draws) for within in (False, True)]
        return cls([one.name for one in runs], trajectories, steps, [role_scores(x) for x in evidence], *matched, notes)

    @property
    def heads(self) -> tuple[Component, ...]:
        return self.trajectories[0].heads

    def document(self) -> dict[str, Any]:
        """Describes winners and stabilities, ready for `RolesEntry`."""
        winners = {}
        for index, role in enumerate(ROLES):
            winners[role] = []
            for name, scores in zip(self.names, self.scores, strict=True):
                first, second = ranking(scores[:, index])[:2].tolist() if len(scores) > 1 else (0, 0)
                score = float(scores[first, index])
                winner = str(self.heads[first]) if score > 0 else None
                runner_up = float(scores[second, index]) if second != first else 0.0
                winners[role].append({"run": name, "component": winner, "score": score, "second_score": runner_up})
        return {
            "evidence": "interventions" if self.trajectories[0].from_interventions else "ablation",
            "steps": dict(zip(self.names, self.steps, strict=True)),
            "winners": winners,
            "role_stability": _stability(self.free.similarity, "mean"),
            "address_stability": _stability(self.free.address, "mean"),
        }

    def matches(self) -> list[dict[str, Any]]:
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
            "similarity": _stability(match.similarity, "observed"),
            "address": _stability(match.address, "observed"),
        }

    def outliers(self) -> list[dict[str, Any]]:
        """Names runs whose roles are unlike the others'."""
        own: list[list[float]] = [[] for _ in self.names]
        for (a, b), match in self.free.pairs.items():
            own[a].append(match.similarity.observed)
            own[b].append(match.similarity.observed)
        means = [float(np.mean(values)) for values in own]
        return _named("mean similarity of its heads' roles to the others'", self.names, means, outliers(means))

    def dataset(self, steps: np.ndarray) -> xr.Dataset:
        """Labels role scores of all heads, and the trajectories of each role's winner, at the common steps."""
        every = np.full((len(self.names), len(steps), len(self.heads), len(ROLES)), np.nan)
        for r, of_run in enumerate(self.trajectories):
            for s, step in enumerate(steps.tolist()):
                if step in of_run.steps:
                    every[r, s] = role_scores(of_run.over([step]))
        winner = np.array([[int(scores[:, i].argmax()) for i in range(len(ROLES))] for scores in self.scores])
        followed = np.take_along_axis(every, winner[:, None, None, :], axis=2)[:, :, 0]  # [run, step, role]
        names = [str(head) for head in self.heads]
        dims = ("run", "step", "component", "role")
        about = {"units": "1", "long_name": "attention that shows the role, times the share of the causal effect"}
        found = xr.Dataset(
            {
                "role_score": (dims, every, about),
                "role_winner": (("run", "role"), np.array(names)[winner], {"long_name": "head with the largest score"}),
                "role_trajectory": (
                    ("run", "step", "role"),
                    followed,
                    {"units": "1", "long_name": "score of the role's winner, wherever it is"},
                ),
            },
            coords={"run": self.names, "step": steps, "component": names, "role": list(ROLES)},
        )
        over = found["role_trajectory"]
        for name, reduced in (("mean", over.mean("run")), ("low", over.min("run")), ("high", over.max("run"))):
            words = {"mean": "mean", "low": "smallest", "high": "largest"}[name]
            found[f"role_trajectory_{name}"] = reduced.assign_attrs(units="1", long_name=f"{words} over runs")
        return found


def _phase_steps(one: SweptRun, of_run: RoleTrajectories, best: int) -> list[int]:
    """Chooses the checkpoints that roles are scored over: those of the last window, else the best one.

    With interventions only checkpoints count at which heads were patched.
    """
    windows = one.results.windows.windows
    inside = windows[-1].steps if windows else [best]
    if not of_run.from_interventions:
        return [step for step in inside if step in one.steps]
    known = np.isfinite(np.stack(list(of_run.effects.values()))).any(axis=(0, 2))
    patched = of_run.steps[known].tolist()
    return [step for step in inside if step in patched] or patched


def _stability(found: Stability, name: str) -> dict[str, Any]:
    null = {field: _number(value) for field, value in dataclasses.asdict(found.null).items()}
    return {name: _number(found.observed), "null": null}
