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
from kvjax.compare.compared_roles import ComparedRoles
from kvjax.compare.order import consensus_order, precedences
from kvjax.compare.outliers import named_outliers, outliers, outlying_stretches
from kvjax.compare.settings import CompareSettings
from kvjax.compare.variation import known_number, spread_entry
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
    roles = ComparedRoles.of(runs, stage=settings.stage, draws=settings.null_draws)
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
        "roles": roles.document(),
        "matching": roles.matching(),
        "outliers": [
            *_outlying_events(runs, happened),
            *_outlying_numbers(runs, accuracy),
            *_outlying_trajectories(runs, aligned),
            *roles.outliers(),
        ],
        "notes": [*notes, *_unlike(runs), *_unfinished(runs), *aligned.notes, *roles.stage.notes],
        "settings": settings.recorded,
        "versions": software_versions(),
    }
    return SeedComparison(document, aligned.dataset.merge(roles.dataset(aligned.dataset["step"].values)))


def _unlike(runs: Sequence[SweptRun]) -> list[str]:
    return [
        f"births of {name} are left out: their thresholds differ between runs ({', '.join(words)})"
        for name, words in events.unlike_births(runs).items()
    ]


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
            {"component": str(component), "accuracy_drop": known_number(flat[index])}
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
                values[one.name] = known_number(metrics.sel(split=split, step=step).values)
                ends = one.results.intervals["answer_accuracy"].sel(split=split, step=step)
                low, high = (float(ends.sel(statistic=end)) for end in ("low", "high"))
                errors[one.name] = (high - low) / (2 * 1.959964)
            found[split][when] = spread_entry(values, list(errors.values()))
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
                values[one.name] = known_number(np.nanmax(own.values)) if np.isfinite(own.values).any() else None
            found[f"{target} at {role}"] = spread_entry(values)
    return found


def _outlying_events(runs: Sequence[SweptRun], happened: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Names runs that reached something far before or after all others, or alone did not."""
    found, measured = [], {one.name: one.steps for one in runs}
    words = {"births": "birth of", "half_rises": "half-rise of", "stabilization": "stabilization of"}
    for family, entries in happened.items():
        for name, entry in entries.items():
            own, what = entry["runs"], f"{words[family]} {name}"
            steps = [one["step"] if one["formed"] else None for one in own]
            known_to = [_gap_before(measured[one["run"]], step) for one, step in zip(own, steps, strict=True)]
            found += named_outliers(what, [one["run"] for one in own], steps, outliers(steps, known_to))
            missing = [i for i, one in enumerate(own) if not one["formed"]]
            if len(missing) == 1 and len(own) > 3 and own[missing[0]]["unconfirmed_step"] is None:
                known = [step for step in steps if step is not None]
                if own[missing[0]]["step"] > max(known):  # else it may still come as late as the others'
                    found += named_outliers(what, [one["run"] for one in own], steps, missing)
    return found


def _gap_before(steps: Sequence[int], step: int | None) -> float | None:
    """Says to which standard error a step is known: it lies anywhere after the checkpoint before."""
    if step is None:
        return None
    return (step - max((earlier for earlier in steps if earlier < step), default=0)) / 12**0.5


def _outlying_numbers(runs: Sequence[SweptRun], accuracy: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for split, at in accuracy.items():
        for when, entry in at.items():
            names, values = list(entry["values"]), list(entry["values"].values())
            known_to = [_sampling_error(one, split, value) for one, value in zip(runs, values, strict=True)]
            what = f"accuracy on {split} at its {when} checkpoint"
            found += named_outliers(what, names, values, outliers(values, known_to))
    return found


def _sampling_error(one: SweptRun, split: str, accuracy: Any) -> Any:
    """Estimates the standard error of accuracies over a split's reads; never 0, as one right and one wrong more say."""
    counts = one.results.metrics["read_count"]
    if accuracy is None or split not in counts["split"].values:
        return None
    reads = float(counts.sel(split=split))
    share = (accuracy * reads + 1) / (reads + 2)
    return (share * (1 - share) / reads) ** 0.5


def _outlying_trajectories(runs: Sequence[SweptRun], aligned: Aligned) -> list[dict[str, Any]]:
    accuracy = aligned.dataset["answer_accuracy"].transpose("run", "step", "split")
    steps, names = accuracy["step"].values, accuracy["run"].values.tolist()
    found = []
    for split in accuracy["split"].values.tolist():
        values = accuracy.sel(split=split).values
        errors = [_sampling_error(one, split, own) for one, own in zip(runs, values, strict=True)]
        known_to = np.stack([np.zeros(len(steps)) if error is None else error for error in errors])
        for index, first, last in outlying_stretches(values, known_to, persistence=_PERSISTENCE):
            middle = (first + last) // 2
            what = f"accuracy on {split} from step {steps[first]} to {steps[last]} (at {steps[middle]})"
            found += named_outliers(what, names, values[:, middle].tolist(), [index])
    return found
