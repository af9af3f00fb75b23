"""Necessity and sufficiency of component sets: faithfulness, completeness and minimality as sets grow.

On the clean streams of the pairs. A set is *necessary* as far as the metric drops when it is ablated, *sufficient* as
far as it stays when everything outside the set is. Sets are the prefixes of a ranking, and a named one.

Definitions: docs/definitions.md, "Interventions". Source: Wang et al., Interpretability in the wild (2022), for the
three criteria.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvjax.intervene.ablations import measured_ablations
from kvjax.intervene.inputs import ANSWER_ACCURACY, CLEAN_METRIC, InterventionInputs, Outcome, number, numbers
from kvjax.intervene.kinds.kind import Kind
from kvjax.intervene.metrics import METRICS
from kvjax.intervene.pair_tables import baselines, beside_recovery, put_runs
from kvjax.intervene.recovery import means_per_read, recoveries
from kvjax.intervene.set_runs import SetRuns
from kvjax.intervene.summary_text import cell, center_step, failure, interval, run_lines
from kvjax.model.components import Component, all_components

FAITHFUL = 0.9  # the smallest prefix that reaches this faithfulness is the set whose members are tested


def growing_sets(ranking: np.ndarray) -> np.ndarray:
    """Lists the prefixes of a ranking, from none to all: bool [components + 1, components]."""
    place = np.argsort(ranking)
    return place[None] < np.arange(len(ranking) + 1)[:, None]


def sets_to_ablate(ranking: np.ndarray, named: np.ndarray) -> dict[str, np.ndarray]:
    """Lists every set that curves and criteria need ablated, bool [K, components] by its purpose.

    `necessity`: each prefix of the ranking. `sufficiency`: the complement of each prefix. `named`: the named set and
    its complement. `minimality`: for each member of the named set, in the order of components, the complement of the
    set without that member.
    """
    prefixes = growing_sets(ranking)
    members = np.flatnonzero(named)
    without = np.tile(~named, (len(members), 1))
    without[np.arange(len(members)), members] = True
    return {
        "necessity": prefixes,
        "sufficiency": ~prefixes,
        "named": np.stack([named, ~named]),
        "minimality": without,
    }


def smallest_faithful(faithfulness: np.ndarray, ranking: np.ndarray) -> np.ndarray:
    """Finds the smallest prefix of a ranking whose faithfulness is at least `FAITHFUL`, bool [components]."""
    reached = np.flatnonzero(np.nan_to_num(faithfulness, nan=-np.inf) >= FAITHFUL)
    return growing_sets(ranking)[reached[0] if len(reached) else len(ranking)]


def named_set(members: Sequence[Component], n_layers: int, n_heads: int) -> np.ndarray:
    """Marks a set's members among all components, bool [components]; raises ValueError for one that is not there."""
    components = all_components(n_layers, n_heads)
    chosen = np.zeros(len(components), bool)
    chosen[[components.index(member) for member in members]] = True
    return chosen


def analyse(inputs: InterventionInputs) -> Outcome:
    """Measures necessity, sufficiency, faithfulness, completeness and minimality of growing component sets.

    Components are ranked by the metric that the ablation `rank_by` of each alone costs, over all pairs, at each
    checkpoint. The set whose members are tested is the named one, or the smallest prefix that is faithful under it.
    """
    names = list(map(str, all_components(inputs.config.n_layers, inputs.config.n_heads)))
    # At most: all prefixes, their complements, a named set with its own, and those for its members.
    runs, metric = SetRuns(inputs, capacity=3 * len(names) + 1), inputs.metric
    costs, rankings, named, wanted = [], [], [], []
    for c in range(len(inputs.steps)):
        alone = runs.under(c, inputs.rank_by, np.eye(len(names), dtype=bool))
        lost = alone[f"{metric}_base"].sum() - alone[metric].sum(axis=0)
        costs.append(METRICS[metric].better * lost)
        rankings.append(np.argsort(-costs[-1], kind="stable"))
        if inputs.components is not None:
            named.append(named_set(inputs.components, inputs.config.n_layers, inputs.config.n_heads))
        else:
            curve = runs.under(c, inputs.rank_by, ~growing_sets(rankings[-1]))
            named.append(smallest_faithful(_pooled_faithfulness(curve, metric), rankings[-1]))
        wanted.append(sets_to_ablate(rankings[-1], named[-1]))
    # Named sets differ in size from checkpoint to checkpoint: those of fewer members repeat their last.
    most = max(len(sets["minimality"]) for sets in wanted)
    for sets in wanted:
        rows = np.minimum(np.arange(most), len(sets["minimality"]) - 1)
        sets["minimality"] = sets["minimality"][rows]
    offsets = np.cumsum([0, *(len(wanted[0][name]) for name in wanted[0])])
    parts = {name: slice(a, b) for name, a, b in zip(wanted[0], offsets[:-1], offsets[1:], strict=True)}
    found = {}
    for ablation in measured_ablations(inputs.rank_by):
        each = [runs.under(c, ablation, np.concatenate(list(sets.values()))) for c, sets in enumerate(wanted)]
        found[ablation] = {name: np.stack([x[name] for x in each]) for name in each[0]}
    return _outcome(inputs, names, np.stack(rankings), np.stack(named), found, parts, np.stack(costs))


def _pooled_faithfulness(curve: Mapping[str, np.ndarray], metric: str) -> np.ndarray:
    """Forms the faithfulness of growing sets over all pairs, [prefixes], from the runs that keep each alone."""
    pooled, full = curve[metric].sum(axis=0), curve[f"{metric}_base"].sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        return (pooled - pooled[0]) / (full - pooled[0])


def _outcome(
    inputs: InterventionInputs,
    names: list[str],
    rankings: np.ndarray,
    named: np.ndarray,
    found: dict[str, dict[str, np.ndarray]],
    parts: dict[str, slice],
    cost: np.ndarray,
) -> Outcome:
    sizes, units = np.arange(len(names) + 1), METRICS[inputs.metric].units
    dataset = inputs.dataset(baseline=list(found), set_size=sizes, rank=np.arange(1, len(names) + 1), component=names)
    dataset["ranking"] = (("step", "rank"), np.array(names)[rankings], {"long_name": "components, the costliest first"})
    dataset["cost_alone"] = (
        ("step", "component"),
        cost,
        {"long_name": f"metric that its {inputs.rank_by} ablation alone costs", "units": units},
    )
    dataset["in_named_set"] = (("step", "component"), named)
    dims = ("statistic", "baseline", "pair_kind", "step", "set_size")
    curves: dict[str, list[np.ndarray]] = {}
    for arrays in found.values():
        difference, right = arrays[inputs.metric], arrays["clean_correct"]
        everything = difference[..., parts["necessity"]][..., -1]
        kept, ablated = difference[..., parts["sufficiency"]], difference[..., parts["necessity"]]
        base = arrays[f"{inputs.metric}_base"]
        own = {
            "metric_when_ablated": means_per_read(inputs.groups, ablated),
            "metric_when_kept_alone": means_per_read(inputs.groups, kept),
            "answer_accuracy_when_ablated": means_per_read(inputs.groups, right[..., parts["necessity"]]),
            "answer_accuracy_when_kept_alone": means_per_read(inputs.groups, right[..., parts["sufficiency"]]),
            "faithfulness": recoveries(inputs.groups, kept, everything, base),
            # The complement's faithfulness as the set grows.
            "completeness": recoveries(inputs.groups, ablated, everything, base),
        }
        without = difference[..., parts["minimality"]]
        # The loss has the denominator of faithfulness, so its interval is of the same resamples.
        lost = everything[..., None] + difference[..., parts["named"]][..., 1:] - without
        whole = recoveries(inputs.groups, difference[..., parts["named"]], everything, base)
        own["minimality"] = _by_component(recoveries(inputs.groups, lost, everything, base), named)
        own["faithfulness_of_named_set"], own["completeness_of_named_set"] = whole[..., 1], whole[..., 0]
        for name, x in own.items():
            curves.setdefault(name, []).append(x)
    last = {"minimality": ("component",), "faithfulness_of_named_set": (), "completeness_of_named_set": ()}
    for name, by_baseline in curves.items():
        stacked = np.stack(by_baseline, axis=1)
        dataset[name] = ((*dims[:4], *last.get(name, ("set_size",))), stacked, {"units": "1"})
    for end in ("when_ablated", "when_kept_alone"):
        dataset[f"metric_{end}"].attrs |= CLEAN_METRIC | {"units": units}
        dataset[f"answer_accuracy_{end}"].attrs |= ANSWER_ACCURACY
    for name in ("faithfulness", "completeness"):
        area = np.trapezoid(dataset[name].sel(statistic="estimate").values, sizes / len(names), axis=-1)
        dataset[f"{name}_area"] = (
            dims[1:4],
            area,
            {"long_name": f"area under {name} by share of components", "units": "1"},
        )
    dataset.attrs |= {"metric": inputs.metric, "ranked_by": inputs.rank_by}
    put_runs(dataset, inputs, found[inputs.rank_by], clean="base")
    summary, effects, ranked_by = baselines(dataset, inputs.metric), [], list(found).index(inputs.rank_by)
    for c, step in enumerate(inputs.steps):
        for k, kind in enumerate(inputs.groups.kinds):
            at = {"statistic": "estimate", "baseline": inputs.rank_by, "pair_kind": kind, "step": step}
            faithful, complete = (
                dataset[f"{name}_of_named_set"].values[:, ranked_by, k, c] for name in ("faithfulness", "completeness")
            )
            full, *_, nothing = dataset["metric_when_ablated"].sel(at).values
            effects.append(
                beside_recovery(summary, kind, step)
                | {"metric_of_full_model": number(full), "metric_with_everything_ablated": number(nothing)}
                | {
                    "step": step,
                    "pair_kind": kind,
                    "named_set": [name for name, inside in zip(names, named[c], strict=True) if inside],
                    "ranking": np.array(names)[rankings[c]].tolist(),
                    "faithfulness_of_named_set": numbers(faithful),
                    "completeness_of_named_set": numbers(complete),
                    "faithfulness_curve": [number(x) for x in dataset["faithfulness"].sel(at).values],
                    "completeness_curve": [number(x) for x in dataset["completeness"].sel(at).values],
                    "faithfulness_area": {
                        b: number(dataset["faithfulness_area"].values[i, k, c]) for i, b in enumerate(found)
                    },
                    "minimality": {
                        n: number(x)
                        for n, x in zip(names, dataset["minimality"].sel(at).values, strict=True)
                        if np.isfinite(x)
                    },
                }
            )
    own = {"ranked_by": inputs.rank_by, "effects": effects, "controls": {"faithful_from": FAITHFUL}}
    return Outcome(dataset, summary | own)


def _by_component(losses: np.ndarray, named: np.ndarray) -> np.ndarray:
    """Puts the losses of a set's members, in order, into [3, kinds, C, components]; NaN outside the set."""
    found = np.full((*losses.shape[:-1], named.shape[1]), np.nan)
    for c, inside in enumerate(named):
        found[:, :, c, inside] = losses[:, :, c, : int(inside.sum())]
    return found


def summary_lines(document: Mapping[str, Any]) -> list[str]:
    """Writes faithfulness and completeness of the tested set, and its members."""
    ablation, step = document["ranked_by"].replace("_", " "), center_step(document)
    metric = document["metric"].replace("_", " ")
    lines = [
        *run_lines(document, [step]),
        f"the smallest faithful set, or the one named, under {ablation} ablation at step {step}:",
        f"faithfulness, completeness, {metric} of the full model (their 1) and of all ablated (their 0), members",
    ]
    for effect in document["effects"]:
        if effect["step"] == step:
            kind, fails = effect["pair_kind"], failure(document, effect["pair_kind"], step)
            kept, left = effect["faithfulness_of_named_set"], effect["completeness_of_named_set"]
            ends = (effect[name] for name in ("metric_of_full_model", "metric_with_everything_ablated"))
            shown = f"{interval(kept)} {interval(left)} {' '.join(cell(end, '7.2f') for end in ends)}"
            shown = f"FAILS: {fails}" if fails else f"{shown}  {' '.join(effect['named_set'])}"
            lines.append(f"{kind:<6} {shown}")
    return lines


KIND = Kind("necessity", analyse, summary_lines, settings=("components", "metric", "rank_by"))
