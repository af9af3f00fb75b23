"""Compares the settings of one factor: what its values change, beside what seeds change anyway."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvjax.compare import events
from kvjax.compare.aligned import SweptRun
from kvjax.compare.seeds import accuracies, best_step, leaders
from kvjax.compare.variation import VarianceShares, spread_entry, variance_shares
from kvjax.measure.declaration import HELDOUT_SPLIT
from kvjax.measure.registry import ALL_SPLITS, BIRTH_SPLIT

RESIDUAL_MEASURES = ("residual_drift", "residual_drift_to_reference", "residual_cka")


@dataclasses.dataclass(frozen=True)
class ScreenedRun:
    """A run of a setting.

    Attributes:
      name: unique within its setting.
      path: its directory.
      seed: its seed.
      diverged_at: the step at which its loss stopped being finite; None if it did not.
      swept: what was measured on it; None if nothing could be.
      on_base: the same on the base's probe set; None unless the setting has other data.
      full_splits: answer accuracy of its best checkpoint on whole splits.
    """

    name: str
    path: str
    seed: int
    diverged_at: int | None
    swept: SweptRun | None
    on_base: SweptRun | None
    full_splits: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One value of a factor.

    Attributes:
      label: what the value is called.
      overrides: the fields it sets, with their values.
      runs: a run per seed.
      seeds: the document of the comparison of its seeds, and its folder; None if fewer than two runs were measured.
    """

    label: str
    overrides: Mapping[str, Any]
    runs: Sequence[ScreenedRun]
    seeds: tuple[Mapping[str, Any], str] | None

    @property
    def swept(self) -> list[SweptRun]:
        return [run.swept for run in self.runs if run.swept is not None]


def compare_settings(settings: Sequence[Setting]) -> dict[str, Any]:
    """Compares the settings of a factor, the base first; the document lacks names, sentences and hashes.

    Runs that diverged stay in: what was measured before counts, and a birth that did not come is censored.
    """
    entries = [_setting_entry(setting) for setting in settings]
    return {
        "settings": entries,
        "summaries": _summaries(entries),
        "notes": [note for setting in settings for note in _notes(setting)],
    }


def _setting_entry(setting: Setting) -> dict[str, Any]:
    swept = setting.swept
    best = {one.name: best_step(one) for one in swept}
    on_base = [run.on_base for run in setting.runs if run.on_base is not None]
    document, folder = setting.seeds if setting.seeds is not None else (None, None)
    roles = document["roles"] if document is not None else {}
    return {
        "label": setting.label,
        "overrides": dict(setting.overrides),
        "runs": [_described(run) for run in setting.runs],
        "births": events.births(swept),
        "half_rises": events.half_rises(swept),
        "accuracy": accuracies(swept, best) if swept else {},
        "full_splits": _full_splits(setting.runs),
        "on_base_probe_set": accuracies(on_base, {one.name: best_step(one) for one in on_base}) if on_base else {},
        "residual": _residual(swept, best),
        "candidates": [leaders(one, best[one.name]) for one in swept],
        "roles": roles.get("winners", {}),
        "role_stability": roles.get("role_stability"),
        "address_stability": roles.get("address_stability"),
        "seeds": folder,
    }


def _described(run: ScreenedRun) -> dict[str, Any]:
    sweep = None if run.swept is None else run.swept.results.sweep
    sweep_sha256, story_sha256 = (None, None) if run.swept is None else run.swept.made_from
    return {
        "name": run.name,
        "path": run.path,
        "seed": run.seed,
        "state": "finished" if run.diverged_at is None else "diverged",
        "diverged_at": run.diverged_at,
        "last_step": None if run.swept is None else run.swept.steps[-1],
        "sweep_sha256": sweep_sha256,
        "probe_set_sha256": None if sweep is None else sweep.probe_set.content_sha256,
        "story_sha256": story_sha256,
    }


def _full_splits(runs: Sequence[ScreenedRun]) -> dict[str, dict[str, Any]]:
    splits = dict.fromkeys(split for run in runs for split in run.full_splits)
    return {split: spread_entry({run.name: run.full_splits.get(split) for run in runs}) for split in splits}


def _residual(swept: Sequence[SweptRun], best: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Summarises how the stream at the reads moves at the best checkpoint: the mean over its stages."""
    found = {}
    for name in RESIDUAL_MEASURES:
        if any(name not in one.results.metrics for one in swept) or not swept:
            continue
        values = {}
        for one in swept:
            here = one.results.metrics[name].sel(step=best[one.name])
            for dim, value in (("split", ALL_SPLITS), ("position_role", "prediction")):
                here = here.sel({dim: value}) if dim in here.dims else here
            values[one.name] = float(np.nanmean(here.values)) if np.isfinite(here.values).any() else None
        found[name] = spread_entry(values)
    return found


def _summaries(entries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Forms one number per run of each kind, the variance shares over settings, and differences to the base."""
    labels, found = [entry["label"] for entry in entries], {}

    def take(name: str, unit: str, of: Any) -> None:
        values = [of(entry) for entry in entries]
        if any(value is not None for own in values for value in own.values()):
            found[name] = summarize(unit, labels, values)

    for family, word in (("births", "birth"), ("half_rises", "half-rise")):
        for metric in dict.fromkeys(name for entry in entries for name in entry[family]):
            steps = [_formed_steps(entry, family, metric) for entry in entries]
            medians = [entry[family].get(metric, {"median": None})["median"] for entry in entries]
            if any(step is not None for own in steps for step in own.values()):
                found[f"{word} of {metric}"] = summarize_events(labels, steps, medians)
    for split in dict.fromkeys(split for entry in entries for split in entry["accuracy"]):
        for when in ("best", "last"):
            where = "all splits" if split == ALL_SPLITS else split
            name = f"accuracy on {where} at the {when} checkpoint"
            take(name, "1", lambda e, s=split, w=when: _spread_values(e, e["accuracy"].get(s, {}).get(w)))
    for split in dict.fromkeys(split for entry in entries for split in entry["full_splits"]):
        take(
            f"accuracy on all of {split} (best checkpoint)",
            "1",
            lambda e, s=split: _spread_values(e, e["full_splits"].get(s)),
        )
    of_base = {run["probe_set_sha256"] for run in entries[0]["runs"]} - {None}
    for split in (BIRTH_SPLIT, HELDOUT_SPLIT):
        if any(split in entry["on_base_probe_set"] for entry in entries):
            take(f"accuracy on {split} of the base's probe set", "1", lambda e, s=split: _on_base(e, s, of_base))
    for name in dict.fromkeys(name for entry in entries for name in entry["residual"]):
        take(f"{name} at the best checkpoint", "1", lambda e, n=name: _spread_values(e, e["residual"].get(n)))
    return found


def summarize(unit: str, labels: Sequence[str], values: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    """Summarises one number per run over settings, the base first, ready for `SummaryEntry`."""
    known = [[value for value in own.values() if value is not None] for own in values]
    medians = [float(np.median(own)) if own else None for own in known]
    return _summary(unit, labels, values, medians, variance_shares([np.array(own) for own in known]))


def summarize_events(
    labels: Sequence[str], steps: Sequence[Mapping[str, float | None]], medians: Sequence[float | None]
) -> dict[str, Any]:
    """Summarises when the runs of each setting formed something, ready for `SummaryEntry`.

    Args:
      labels: of the settings, the base first.
      steps: of each setting, by run; None for one that is censored.
      medians: of each setting, by its survival curve. The middle of the runs that formed it would come too early.
    """
    all_formed = all(step is not None for own in steps for step in own.values())
    shares = variance_shares([np.array(list(own.values())) for own in steps]) if all_formed else None
    return _summary("steps", labels, steps, [None if m is None else float(m) for m in medians], shares)


def _summary(
    unit: str,
    labels: Sequence[str],
    values: Sequence[Mapping[str, float | None]],
    medians: Sequence[float | None],
    shares: VarianceShares | None,
) -> dict[str, Any]:
    difference = [None if m is None or medians[0] is None else m - medians[0] for m in medians]
    return {
        "unit": unit,
        "values": {label: dict(own) for label, own in zip(labels, values, strict=True)},
        "medians": dict(zip(labels, medians, strict=True)),
        "shares": None if shares is None else _shares_entry(shares),
        "difference": dict(zip(labels, difference, strict=True)),
    }


def _shares_entry(shares: VarianceShares) -> dict[str, Any]:
    return {"method": "one-way analysis of variance", **dataclasses.asdict(shares)}


def _formed_steps(entry: Mapping[str, Any], family: str, metric: str) -> dict[str, float | None]:
    """Takes when each run formed something; a censored run has no step, and counts in the survival curve alone."""
    own = {one["run"]: one for one in entry[family].get(metric, {"runs": []})["runs"]}
    names = [run["name"] for run in entry["runs"]]
    return {name: float(own[name]["step"]) if name in own and own[name]["formed"] else None for name in names}


def _spread_values(entry: Mapping[str, Any], spread: Mapping[str, Any] | None) -> dict[str, float | None]:
    values = {} if spread is None else spread["values"]
    return {run["name"]: values.get(run["name"]) for run in entry["runs"]}


def _on_base(entry: Mapping[str, Any], split: str, base_probe_sets: set[str]) -> dict[str, float | None]:
    """Takes the accuracy on the base's probe set; a setting with the base's data was measured on it anyway."""
    own = entry["on_base_probe_set"]
    if not own and {run["probe_set_sha256"] for run in entry["runs"]} & base_probe_sets:
        own = entry["accuracy"]
    return _spread_values(entry, own.get(split, {}).get("best"))


def _notes(setting: Setting) -> list[str]:
    notes = []
    for run in setting.runs:
        if run.diverged_at is not None:
            before = "nothing was saved before" if run.swept is None else f"measured to step {run.swept.steps[-1]}"
            notes.append(
                f"{setting.label}, seed {run.seed}: the loss was no number at step {run.diverged_at}; {before}"
            )
        elif run.swept is None:
            notes.append(f"{setting.label}, seed {run.seed}: no checkpoint of it could be measured")
    return notes
