"""Compares what ablating a component costs with what patching it recovers (docs/definitions.md, "Interventions").

An ablation asks whether something has to be written there, patching whether it carries what differs between the two
streams. A component that writes a constant costs much when it is zeroed and recovers nothing. The rank correlation of
the two says how far each kind of ablation can be read as "carries the content".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from kvjax.artifacts.recovery_tables import PATCHING
from kvjax.artifacts.results import Intervention, RunResults
from kvjax.errors import InputError
from kvjax.intervene.inputs import numbers
from kvjax.intervene.recovery import RESAMPLE_SEED
from kvjax.measure.statistics import spearman
from kvjax.measure.uncertainty import percentile_interval, resample_counts, resampled_ratios
from kvjax.model.components import Component
from kvjax.task.corruption import PAIR_KINDS

CONTROLS = ("random",)  # ablations that are no kind of their own
LARGEST, MEAN = "largest", "mean"  # over the kinds of pair whose clean run does not fail
HEADLINE = {"of": "heads", "recovery": LARGEST}


@dataclasses.dataclass(frozen=True)
class Ablated:
    """Accuracy that ablating each component costs at one checkpoint, over all read events.

    Attributes:
      names: of the components, heads then MLPs.
      drops: by kind of ablation, the estimates [components].
      samples: under J resamples of sequences, [J, components].
    """

    names: tuple[str, ...]
    drops: Mapping[str, np.ndarray]
    samples: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Recovered:
    """Recovery when a component is taken from the clean run, by kind of pair, at one checkpoint.

    Attributes:
      recoveries: by kind of pair, [components]; NaN if the runs do not differ.
      samples: under J resamples of pairs, [J, components].
      counted: the kinds whose clean run does not fail.
    """

    recoveries: Mapping[str, np.ndarray]
    samples: Mapping[str, np.ndarray]
    counted: tuple[str, ...]

    def over_kinds(self, how: str) -> tuple[np.ndarray, np.ndarray]:
        """Takes the largest or the mean recovery over the kinds that count: [components], and under resamples."""
        reduce = {LARGEST: np.max, MEAN: np.mean}[how]
        return tuple(
            reduce(np.stack([of[kind] for kind in self.counted]), axis=0) for of in (self.recoveries, self.samples)
        )


def compare_importance(results: RunResults, metric: str) -> dict[str, Any]:
    """Compares ablations and recoveries at every step that has both.

    Returns:
      `metric`, `split`, and `steps`: by step as text,

      - `components`, a row each: `accuracy_drop` by kind of ablation, `recovery` by kind of pair, `largest_recovery`;
      - `counted_pair_kinds`: those whose clean run does not fail;
      - `rank_correlation`, rows from `rank_correlations`.

    Raises:
      InputError: the sweep's tables are missing or damaged.
    """
    events, intervals = results.events, results.intervals.sel(split="all")
    found: dict[int, dict[str, Any]] = {}
    for patched in _by_age(results):
        for step in set(patched["step"].values.tolist()) & set(events["step"].values.tolist()):
            own = patched.sel(step=step, metric=metric)
            found[step] = _at_step(events.sel(step=step), intervals.sel(step=step), own)
    return {"metric": metric, "split": "all", "steps": {str(step): found[step] for step in sorted(found)}}


def _by_age(results: RunResults) -> list[xr.Dataset]:
    """Opens the arrays of activation patching, the newest last; damaged ones and older versions are left out."""
    opened = []
    for path in sorted(results.intervention_files(PATCHING), key=lambda path: path.stat().st_mtime_ns):
        try:
            opened.append(Intervention.open(path).dataset)
        except InputError:
            continue
    return [dataset for dataset in opened if "kind_of_pair" in dataset.coords]


def _at_step(events: xr.Dataset, intervals: xr.Dataset, patched: xr.Dataset) -> dict[str, Any]:
    ablated = ablation_drops(events, intervals["ablation"].values.tolist())
    recovered = component_recoveries_of(patched, ablated.names)
    rows = []
    largest = recovered.over_kinds(LARGEST) if recovered.counted else None
    for index, name in enumerate(ablated.names):
        component = Component.parse(name)
        drops = intervals["mlp_accuracy_drop" if component.is_mlp else "head_accuracy_drop"]
        drops = drops.sel(layer=component.layer, **({} if component.is_mlp else {"head": component.head}))
        row: dict[str, Any] = {"component": name}
        row["accuracy_drop"] = {kind: numbers(drops.sel(ablation=kind).values) for kind in ablated.drops}
        row["recovery"] = {
            kind: _with_interval(values[index], recovered.samples[kind][:, index])
            for kind, values in recovered.recoveries.items()
        }
        row["largest_recovery"] = _with_interval(largest[0][index], largest[1][:, index]) if largest else None
        rows.append(row)
    return {
        "components": rows,
        "counted_pair_kinds": list(recovered.counted),
        "rank_correlation": rank_correlations(ablated, recovered),
    }


def ablation_drops(events: xr.Dataset, kinds: Sequence[str]) -> Ablated:
    """Forms the accuracy that ablations cost, from the sweep's events of one checkpoint.

    Args:
      events: of the checkpoint.
      kinds: of ablation, in their order; those that `events` lack, and controls, are left out.
    """
    reads = events["is_read"].sum("read").values
    right = events["read_correct"].sum("read").values
    counts = resample_counts(np.unique(events["split"].values, return_inverse=True)[1])
    layers, heads = events.sizes["layer"], events.sizes["head"]
    names = [str(Component(layer, head)) for layer in range(layers) for head in range(heads)]
    names += [str(Component(layer)) for layer in range(layers)]
    drops, samples = {}, {}
    for kind in kinds:
        parts = [f"{part}_{kind}_correct" for part in ("head", "mlp")]
        if kind in CONTROLS or not all(name in events for name in parts):
            continue
        under = [events[name].transpose("sequence", ...).values.reshape(len(reads), -1) for name in parts]
        lost = (right[:, None] - np.concatenate(under, axis=1))[None]  # [1, sequences, components]
        values, resampled = resampled_ratios(counts, lost, np.broadcast_to(reads[None, :, None], lost.shape))
        drops[kind], samples[kind] = values[0], resampled[:, 0]
    return Ablated(tuple(names), drops, samples)


def component_recoveries_of(patched: xr.Dataset, names: Sequence[str]) -> Recovered:
    """Forms the recovery of each component from the metric of every pair, at one checkpoint and of one metric."""
    own = patched.sel(direction="denoising", position_role="all", place=list(names))
    kinds = patched["kind_of_pair"].values
    counts = resample_counts(np.array([PAIR_KINDS.index(kind) for kind in kinds]), seed=RESAMPLE_SEED)
    moved = own["metric_by_role"].transpose("pair", "place").values - own["metric_corrupted"].values[:, None]
    gap = (own["metric_clean"] - own["metric_corrupted"]).values
    recovered, samples, counted = {}, {}, []
    for kind in patched["pair_kind"].values.tolist():
        members = kinds == kind
        # The denominator is made positive, so that resamples divide by numbers of one sign.
        sign = -1.0 if gap[members].sum() < 0 else 1.0
        parts = (
            sign * moved[None, members],
            np.broadcast_to(sign * gap[None, members, None], moved[None, members].shape),
        )
        values, resampled = resampled_ratios(counts[:, members], *parts)
        at = {"statistic": "estimate", "pair_kind": kind}
        known = np.isfinite(own["recovery_by_role"].sel(at).values)
        recovered[kind] = np.where(known, values[0], np.nan)
        samples[kind] = np.where(known, resampled[:, 0], np.nan)
        if not bool(patched["clean_run_fails"].sel(pair_kind=kind).any()):
            counted.append(kind)
    return Recovered(recovered, samples, tuple(counted))


def rank_correlations(ablated: Ablated, recovered: Recovered) -> list[dict[str, Any]]:
    """Correlates by rank each kind of ablation's drops with the recoveries, over heads and over all components.

    Each row names the `ablation`, `of` which components (`heads`, `all`) and with which `recovery`: of a kind of pair,
    or the `largest` or `mean` over those that count. `headline` marks the rows to quote. `value` has an interval.

    Intervals resample sequences and pairs, not components: those are all there are. `above_zero` is the difference from
    zero ablation's correlation under the same resamples.
    """
    sides = {kind: (recovered.recoveries[kind], recovered.samples[kind]) for kind in recovered.counted}
    if recovered.counted:
        sides = {how: recovered.over_kinds(how) for how in (LARGEST, MEAN)} | sides
    is_head = np.array([not Component.parse(name).is_mlp for name in ablated.names])
    found = []
    for of, chosen in (("heads", is_head), ("all", np.ones_like(is_head))):
        for recovery, (values, samples) in sides.items():
            correlated = {
                ablation: (
                    spearman(drops[chosen], values[chosen]),
                    spearman(ablated.samples[ablation][:, chosen], samples[:, chosen]),
                )
                for ablation, drops in ablated.drops.items()
            }
            for ablation, (value, resampled) in correlated.items():
                row = {"ablation": ablation, "of": of, "components": int(chosen.sum()), "recovery": recovery}
                row |= {"headline": row | HEADLINE == row, "value": _with_interval(value, resampled)}
                if ablation != "zero" and "zero" in correlated:
                    zero, of_zero = correlated["zero"]
                    row["above_zero"] = _with_interval(value - zero, resampled - of_zero)
                found.append(row)
    return found


def _with_interval(value: float, samples_J: np.ndarray) -> dict[str, float | None]:
    low, high = percentile_interval(samples_J[:, None])
    return numbers(np.array([value, low[0], high[0]]))
