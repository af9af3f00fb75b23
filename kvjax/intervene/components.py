"""Components of a window: sets of heads and MLPs, and single neurons; as labelled arrays and a summary."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import xarray as xr

from kvjax.devices import Placement
from kvjax.execution.unbucket import unbucket
from kvjax.intervene.inputs import ANSWER_ACCURACY, CLEAN_METRIC, Outcome, Study, number, numbers
from kvjax.intervene.necessity import (
    BASELINES,
    FAITHFUL,
    growing_sets,
    named_set,
    pair_donors,
    set_effects,
    sets_to_ablate,
    smallest_faithful,
    token_outputs,
)
from kvjax.intervene.neurons import head_spectra, neuron_effects
from kvjax.intervene.pair_runs import measuring
from kvjax.intervene.recovery import means_per_read, recoveries
from kvjax.measure.statistics import places
from kvjax.model.components import all_components
from kvjax.model.transforms import over_checkpoints
from kvjax.model.weights import mlp_output_kernels
from kvjax.task.encoding import bucket_by_length

TOP_NEURONS = 20


def necessity(study: Study) -> Outcome:
    """Returns necessity, sufficiency, faithfulness, completeness and minimality of growing component sets.

    Components are ranked by the metric that their mean ablation alone costs, over all pairs, at each checkpoint. The
    set whose members are tested is the one that was named, or the smallest prefix that is faithful under mean ablation.
    """
    names = list(map(str, all_components(study.config.n_layers, study.config.n_heads)))
    values = {"mean": study.means, "zero": {name: np.zeros_like(x) for name, x in study.means.items()}}
    donors = pair_donors(study.clean, study.clean_rows, study.pairs.buckets)

    def under(sets_CxKxX: np.ndarray, baseline: str) -> dict[str, np.ndarray]:
        measure = measuring(_sets, study.config)
        tree = {"params": study.stacked, "sets": sets_CxKxX}
        if baseline != "resample":
            return study.pairs.run(measure, tree | {"values": values[baseline]})
        # Outputs at every token are too many to hold for all checkpoints.
        each = []
        for c in range(len(study.steps)):
            own = jax.tree.map(lambda x, c=c: x[c : c + 1], tree)
            outputs = jax.device_get(token_outputs(study.config, study.checkpoint(c), study.clean_batches))
            own["values"] = jax.tree.map(lambda x: x[None], outputs)
            each.append(study.pairs.run(measure, own, per_bucket=donors))
        return {name: np.concatenate([x[name] for x in each]) for name in each[0]}

    single = np.broadcast_to(np.eye(len(names), dtype=bool), (len(study.steps), len(names), len(names)))
    alone = under(single, "mean")
    cost = alone["difference_base"].sum(axis=1)[:, None] - alone["difference"].sum(axis=1)  # [C, components]
    rankings = np.argsort(-cost, axis=1, kind="stable")
    given = None
    if study.components is not None:
        given = named_set(study.components, study.config.n_layers, study.config.n_heads)
    named = np.stack([given if given is not None else np.ones(len(names), bool)] * len(rankings))
    if given is None:
        # What is faithful is seen from the curves; they do not depend on the named set.
        curves = under(np.stack([~growing_sets(ranking) for ranking in rankings]), "mean")
        pooled = curves["difference"].sum(axis=1)  # [C, prefixes]
        full = curves["difference_base"].sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            faithful = (pooled - pooled[:, :1]) / (full[:, None] - pooled[:, :1])
        named = np.stack([smallest_faithful(f, r) for f, r in zip(faithful, rankings, strict=True)])
    # Named sets differ in size from checkpoint to checkpoint: those of fewer members repeat their last.
    wanted = [sets_to_ablate(r, n) for r, n in zip(rankings, named, strict=True)]
    most = max(len(sets["minimality"]) for sets in wanted)
    for sets in wanted:
        rows = np.minimum(np.arange(most), len(sets["minimality"]) - 1)
        sets["minimality"] = sets["minimality"][rows]
    offsets = np.cumsum([0, *(len(wanted[0][name]) for name in wanted[0])])
    parts = {name: slice(a, b) for name, a, b in zip(wanted[0], offsets[:-1], offsets[1:], strict=True)}
    stacked = np.stack([np.concatenate(list(sets.values())) for sets in wanted])
    found = {baseline: under(stacked, baseline) for baseline in BASELINES}
    return _necessity_outcome(study, names, rankings, named, found, parts, cost)


def _necessity_outcome(
    study: Study,
    names: list[str],
    rankings: np.ndarray,
    named: np.ndarray,
    found: dict[str, dict[str, np.ndarray]],
    parts: dict[str, slice],
    cost: np.ndarray,
) -> Outcome:
    sizes = np.arange(len(names) + 1)
    dataset = study.dataset(baseline=BASELINES, set_size=sizes, rank=np.arange(1, len(names) + 1), component=names)
    dataset["ranking"] = (("step", "rank"), np.array(names)[rankings], {"long_name": "components, the costliest first"})
    dataset["cost_alone"] = (
        ("step", "component"),
        cost,
        {"long_name": "metric its mean ablation costs", "units": "logits"},
    )
    dataset["in_named_set"] = (("step", "component"), named)
    dims = ("statistic", "baseline", "pair_kind", "step", "set_size")
    curves: dict[str, list[np.ndarray]] = {}
    for arrays in found.values():
        difference, right = arrays["difference"], arrays["clean_correct"]
        everything = difference[..., parts["necessity"]][..., -1]
        kept, ablated = difference[..., parts["sufficiency"]], difference[..., parts["necessity"]]
        base = arrays["difference_base"]
        own = {
            "metric_when_ablated": means_per_read(study.groups, ablated),
            "metric_when_kept_alone": means_per_read(study.groups, kept),
            "answer_accuracy_when_ablated": means_per_read(study.groups, right[..., parts["necessity"]]),
            "answer_accuracy_when_kept_alone": means_per_read(study.groups, right[..., parts["sufficiency"]]),
            "faithfulness": recoveries(study.groups, kept, everything, base),
            # The complement's faithfulness as the set grows: what the set leaves behind.
            "completeness": recoveries(study.groups, ablated, everything, base),
        }
        without = difference[..., parts["minimality"]]
        # The loss of faithfulness, of one denominator with it, so in the same resamples.
        lost = everything[..., None] + difference[..., parts["named"]][..., 1:] - without
        whole = recoveries(study.groups, difference[..., parts["named"]], everything, base)
        own["minimality"] = _by_component(recoveries(study.groups, lost, everything, base), named)
        own["faithfulness_of_named_set"], own["completeness_of_named_set"] = whole[..., 1], whole[..., 0]
        for name, x in own.items():
            curves.setdefault(name, []).append(x)
    last = {"minimality": ("component",), "faithfulness_of_named_set": (), "completeness_of_named_set": ()}
    for name, by_baseline in curves.items():
        stacked = np.stack(by_baseline, axis=1)
        units = "logits" if name.startswith("metric") else "1"
        dataset[name] = ((*dims[:4], *last.get(name, ("set_size",))), stacked, {"units": units})
    for end in ("when_ablated", "when_kept_alone"):
        dataset[f"metric_{end}"].attrs |= CLEAN_METRIC
        dataset[f"answer_accuracy_{end}"].attrs |= ANSWER_ACCURACY
    for name in ("faithfulness", "completeness"):
        area = np.trapezoid(dataset[name].sel(statistic="estimate").values, sizes / len(names), axis=-1)
        dataset[f"{name}_area"] = (
            dims[1:4],
            area,
            {"long_name": f"area under {name} by share of components", "units": "1"},
        )
    effects = []
    for c, step in enumerate(study.steps):
        for k, kind in enumerate(study.groups.kinds):
            at = {"statistic": "estimate", "baseline": "mean", "pair_kind": kind, "step": step}
            effects.append(
                {
                    "step": step,
                    "pair_kind": kind,
                    "named_set": [name for name, inside in zip(names, named[c], strict=True) if inside],
                    "ranking": np.array(names)[rankings[c]].tolist(),
                    "faithfulness_of_named_set": numbers(dataset["faithfulness_of_named_set"].values[:, 1, k, c]),
                    "completeness_of_named_set": numbers(dataset["completeness_of_named_set"].values[:, 1, k, c]),
                    "faithfulness_curve": [number(x) for x in dataset["faithfulness"].sel(at).values],
                    "completeness_curve": [number(x) for x in dataset["completeness"].sel(at).values],
                    "faithfulness_area": {
                        b: number(dataset["faithfulness_area"].values[i, k, c]) for i, b in enumerate(BASELINES)
                    },
                    "minimality": {
                        n: number(x)
                        for n, x in zip(names, dataset["minimality"].sel(at).values, strict=True)
                        if np.isfinite(x)
                    },
                }
            )
    baseline = study.baseline(found["mean"], "base")
    return Outcome(
        dataset, {"baseline": {"clean": baseline}, "effects": effects, "controls": {"faithful_from": FAITHFUL}}
    )


def _by_component(losses: np.ndarray, named: np.ndarray) -> np.ndarray:
    """Returns the losses of members, [3, kinds, C, components], from those of a set's members in order; NaN outside."""
    found = np.full((*losses.shape[:-1], named.shape[1]), np.nan)
    for c, inside in enumerate(named):
        found[:, :, c, inside] = losses[:, :, c, : int(inside.sum())]
    return found


def neurons(study: Study) -> Outcome:
    """Returns every neuron's exact ablation, write strength and attribution on the probe set, and head spectra."""
    buckets = bucket_by_length(study.records, tokens_per_batch=study.record_tokens_per_batch)
    value_ids = tuple(study.vocabulary.value_ids.tolist())
    outputs = []
    for bucket in buckets:
        devices = min(study.devices, len(study.steps))
        each = []
        for start in range(0, len(study.steps), devices):
            rows = np.minimum(np.arange(start, start + devices), len(study.steps) - 1)
            chunk = jax.tree.map(lambda x, rows=rows: x[rows], study.stacked)
            each.append(
                jax.device_get(neuron_sums(study.config, bucket.horizon, value_ids, devices, chunk, bucket.batches))
            )
        outputs.append(jax.tree.map(lambda *x: np.concatenate(x)[: len(study.steps)], *each))
    arrays = unbucket(outputs, buckets, len(study.records))
    reads = float(study.records.is_read.sum())
    dataset = xr.Dataset(coords={"step": list(study.steps), "layer": np.arange(study.config.n_layers)})
    dims = ("step", "layer", "neuron")
    clean = {name: arrays[f"clean_{name}"].sum(axis=1)[:, None, None] for name in ("correct", "margin")}
    lost = {name: (clean[name] - arrays[name].sum(axis=1, dtype=np.float64)) / reads for name in clean}
    out = np.linalg.norm(np.asarray(mlp_output_kernels(study.stacked)), axis=-1)  # [C, L, F]
    columns = {
        "accuracy_drop": (lost["correct"], "clean minus ablated answer accuracy", "1"),
        "margin_drop": (lost["margin"], "clean minus ablated answer margin", "logits"),
        "write_strength": (
            arrays["activation"].sum(axis=1) / reads * out,
            "mean |activation| at p_e times the norm of its output weights",
            "1",
        ),
        "direct_logit_attribution": (
            arrays["direct_logit_attribution"].sum(axis=1) / reads,
            "what it adds to logit(answer) - mean logit over values",
            "logits",
        ),
    }
    for name, (values, long_name, units) in columns.items():
        dataset[name] = (dims, values, {"long_name": long_name, "units": units})
    spectra = [head_spectra(study.checkpoint(c), study.config.n_heads) for c in range(len(study.steps))]
    for name in spectra[0]:
        axes = ("step", "layer", "head", "singular_value") if name.endswith("values") else ("step", "layer", "head")
        dataset[name] = (axes, np.stack([x[name] for x in spectra]), {"units": "1"})
    effects = []
    for c, step in enumerate(study.steps):
        drops = lost["margin"][c]
        for index in np.argsort(-np.abs(drops).ravel(), kind="stable")[:TOP_NEURONS]:
            layer, neuron = (int(i) for i in np.unravel_index(index, drops.shape))
            row = {name: number(values[c, layer, neuron]) for name, (values, _, _) in columns.items()}
            effects.append({"step": step, "layer": layer, "neuron": neuron, **row})
    return Outcome(dataset, {"baseline": {}, "effects": effects, "controls": {}})


def neuron_rows(dataset: xr.Dataset) -> list[dict[str, Any]]:
    """Returns one row per step and neuron, for `component_candidates/neurons.jsonl`; ranks are by margin drop."""
    rows = []
    names = ("accuracy_drop", "margin_drop", "write_strength", "direct_logit_attribution")
    for c, step in enumerate(dataset["step"].values.tolist()):
        values = {name: dataset[name].values[c] for name in names}
        ranks = places(values["margin_drop"])
        for layer, neuron in np.ndindex(*ranks.shape):
            own = {name: number(x[layer, neuron]) for name, x in values.items()}
            rows.append({"step": step, "layer": layer, "neuron": neuron, **own, "rank": int(ranks[layer, neuron])})
    return rows


def _sets(config, tree, batch, donors, window):
    del window
    return set_effects(tree, config, batch, donors)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def neuron_sums(config, horizon, value_ids, devices, stacked, batches):
    """Returns `neuron_effects` of every microbatch [microbatch, B, …] at stacked checkpoints, shared among devices."""

    def one_checkpoint(params, batches):
        measure = functools.partial(neuron_effects, params, config, horizon=horizon, value_ids=np.array(value_ids))
        return jax.lax.map(measure, batches)

    return over_checkpoints(one_checkpoint, Placement(devices))(stacked, batches)
