"""Necessity and sufficiency of component sets: faithfulness, completeness and minimality as sets grow.

On the clean streams of the pairs. A set is *necessary* as far as the metric drops when it is ablated, *sufficient* as
far as it stays when everything outside the set is. Sets are the prefixes of a ranking, and a named one.

Definitions: docs/definitions.md, "Interventions". Source: Wang et al., Interpretability in the wild (2022), for the
three criteria.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.execution.over_pairs import PairBatch
from kvjax.intervene.inputs import ANSWER_ACCURACY, CLEAN_METRIC, InterventionInputs, Outcome, number, numbers
from kvjax.intervene.kinds.kind import Kind
from kvjax.intervene.metrics import METRICS
from kvjax.intervene.pair_runs import Effects, answer_effects
from kvjax.intervene.pair_tables import baselines, put_runs
from kvjax.intervene.recovery import means_per_read, recoveries
from kvjax.intervene.summary_text import center_step, interval
from kvjax.model.components import Component, all_components
from kvjax.model.decoder import DecoderConfig, Params
from kvjax.model.interventions import Edit, Interventions
from kvjax.model.restart import RESTART_CAPTURE, restart, run_clean
from kvjax.model.sites import Trace, take_positions
from kvjax.task.donors import draw_donors
from kvjax.task.encoding import EncodedRecords
from kvjax.task.pair_encoding import EncodedPairs, PairBucket

BASELINES = ("zero", "mean", "resample")
FAITHFUL = 0.9  # the smallest prefix that reaches this faithfulness is the set whose members are tested

DONOR_SEED = 0


def ablation(heads_LxH: jax.Array, mlps_L: jax.Array, values: Trace, *, n_layers: int, n_heads: int) -> Interventions:
    """Makes the edits that replace the outputs of a set of heads and MLPs, at every position.

    Args:
      heads_LxH, mlps_L: bool, the set.
      values: `head_z` and `mlp_out`, each of the site's axes, of their length or 1.
    """
    assert heads_LxH.shape == (n_layers, n_heads) and mlps_L.shape == (n_layers,)
    return {
        "head_z": Edit(heads_LxH[:, None, None, :, None], values["head_z"]),
        "mlp_out": Edit(mlps_L[:, None, None, None], values["mlp_out"]),
    }


def set_effects(tree: dict, config: DecoderConfig, batch: EncodedPairs, donors_BxT: jax.Array | None) -> Effects:
    """Ablates each of K sets in the clean streams, [B, K] each.

    Args:
      tree: one checkpoint's `params`, `sets` (bool [K, components]) and `values` of `head_z` and `mlp_out`: the
        replacements, with the sites' axes, or the outputs at every token that donors are named among.
      config: its shape.
      batch: a microbatch of pairs.
      donors_BxT: the token that each position's replacement comes from; None if `values` are the replacements.
    """
    params, sets = tree["params"], tree["sets"]
    tokens = jnp.asarray(batch.clean_tokens)
    logits, clean = run_clean(params, config, tokens, RESTART_CAPTURE)
    values = tree["values"]
    if donors_BxT is not None:
        values = {name: x[:, donors_BxT] for name, x in values.items()}

    def under(chosen: jax.Array) -> Effects:
        by_layer = chosen.reshape(config.n_layers, config.n_heads + 1)
        edits = ablation(by_layer[:, :-1], by_layer[:, -1], values, n_layers=config.n_layers, n_heads=config.n_heads)
        read = restart(params, config, clean, edits, layer=0, positions_BxQ=batch.prediction_positions)
        return answer_effects(read, batch)

    found = jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), jax.lax.map(under, sets))
    full = answer_effects(take_positions(logits, batch.prediction_positions, 1), batch)
    return found | {f"{name}_base": x for name, x in full.items()}


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


def pair_donors(clean: EncodedRecords, clean_rows: np.ndarray, buckets: Sequence[PairBucket]) -> list[np.ndarray]:
    """Draws, for every position of the pairs' clean streams, the token that resampling takes its outputs from.

    One draw of `draw_donors` over the distinct clean streams: of the same token role, in another stream of the same
    split, whatever the batches.

    Args:
      clean: the distinct clean streams.
      clean_rows: which of them each pair has.
      buckets: the pairs.

    Returns:
      For each bucket, int32 [microbatch, B, T]; a token is named row * length + position.
    """
    (donors,) = draw_donors(clean, draws=1, seed=DONOR_SEED)
    found = []
    for bucket in buckets:
        shape = bucket.batches.clean_tokens.shape
        rows = clean_rows[np.where(bucket.indices < 0, bucket.indices.max(), bucket.indices)]
        found.append(donors[rows, : shape[-1]].reshape(shape).astype(np.int32))
    return found


@functools.partial(jax.jit, static_argnums=0)
def token_outputs(config: DecoderConfig, params: Params, batches: EncodedRecords) -> Trace:
    """Records the outputs of components at every token of records in microbatches, [L, tokens, …] by site."""

    def of_batch(batch: EncodedRecords) -> Trace:
        _, clean = run_clean(params, config, batch.tokens, ("head_z", "mlp_out"))
        return {name: clean.trace[name] for name in ("head_z", "mlp_out")}

    by_batch = jax.lax.map(of_batch, batches)  # [M, L, B, T, …]
    return {name: jnp.moveaxis(x, 1, 0).reshape(x.shape[1], -1, *x.shape[4:]) for name, x in by_batch.items()}


@dataclasses.dataclass(frozen=True)
class AblateSets:
    """The measurement: every set of a checkpoint ablated in the clean streams."""

    config: DecoderConfig

    def __call__(self, tree: dict[str, Any], batch: PairBatch) -> Effects:
        """Runs `set_effects`."""
        return set_effects(tree, self.config, batch.pairs, batch.donors_BxT)


def analyse(inputs: InterventionInputs) -> Outcome:
    """Measures necessity, sufficiency, faithfulness, completeness and minimality of growing component sets.

    Components are ranked by the metric that their mean ablation alone costs, over all pairs, at each checkpoint. The
    set whose members are tested is the named one, or the smallest prefix that is faithful under mean ablation.
    """
    names = list(map(str, all_components(inputs.config.n_layers, inputs.config.n_heads)))
    values = {"mean": inputs.means, "zero": {name: np.zeros_like(x) for name, x in inputs.means.items()}}
    donors = pair_donors(inputs.clean, inputs.clean_rows, inputs.over_streams.buckets)

    def under(sets_CxKxX: np.ndarray, baseline: str) -> dict[str, np.ndarray]:
        measure = AblateSets(inputs.config)
        tree = {"params": inputs.stacked, "sets": sets_CxKxX}
        if baseline != "resample":
            return inputs.over_streams.run(measure, tree | {"values": values[baseline]})
        # Outputs at every token are too many to hold for all checkpoints.
        each = []
        for c in range(len(inputs.steps)):
            own = jax.tree.map(lambda x, c=c: x[c : c + 1], tree)
            outputs = jax.device_get(token_outputs(inputs.config, inputs.checkpoint(c), inputs.clean_batches))
            own["values"] = jax.tree.map(lambda x: x[None], outputs)
            each.append(inputs.over_streams.run(measure, own, donors=donors))
        return {name: np.concatenate([x[name] for x in each]) for name in each[0]}

    single = np.broadcast_to(np.eye(len(names), dtype=bool), (len(inputs.steps), len(names), len(names)))
    alone = under(single, "mean")
    metric = inputs.metric
    lost = alone[f"{metric}_base"].sum(axis=1)[:, None] - alone[metric].sum(axis=1)  # [C, components]
    cost = METRICS[metric].better * lost
    rankings = np.argsort(-cost, axis=1, kind="stable")
    given = None
    if inputs.components is not None:
        given = named_set(inputs.components, inputs.config.n_layers, inputs.config.n_heads)
    named = np.stack([given if given is not None else np.ones(len(names), bool)] * len(rankings))
    if given is None:
        # Faithfulness is read off the curves, which do not depend on the named set.
        curves = under(np.stack([~growing_sets(ranking) for ranking in rankings]), "mean")
        pooled = curves[metric].sum(axis=1)  # [C, prefixes]
        full = curves[f"{metric}_base"].sum(axis=1)
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
    return _outcome(inputs, names, rankings, named, found, parts, cost)


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
    dataset = inputs.dataset(baseline=BASELINES, set_size=sizes, rank=np.arange(1, len(names) + 1), component=names)
    dataset["ranking"] = (("step", "rank"), np.array(names)[rankings], {"long_name": "components, the costliest first"})
    dataset["cost_alone"] = (
        ("step", "component"),
        cost,
        {"long_name": "metric its mean ablation costs", "units": units},
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
    effects = []
    for c, step in enumerate(inputs.steps):
        for k, kind in enumerate(inputs.groups.kinds):
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
    dataset.attrs["metric"] = inputs.metric
    put_runs(dataset, inputs, found["mean"], clean="base")
    summary = {"effects": effects, "controls": {"faithful_from": FAITHFUL}}
    return Outcome(dataset, baselines(dataset, inputs.metric) | summary)


def _by_component(losses: np.ndarray, named: np.ndarray) -> np.ndarray:
    """Puts the losses of a set's members, in order, into [3, kinds, C, components]; NaN outside the set."""
    found = np.full((*losses.shape[:-1], named.shape[1]), np.nan)
    for c, inside in enumerate(named):
        found[:, :, c, inside] = losses[:, :, c, : int(inside.sum())]
    return found


def summary_lines(document: Mapping[str, Any]) -> list[str]:
    """Writes faithfulness and completeness of the tested set, and its members."""
    lines = ["faithfulness and completeness of the smallest faithful set, or the one named, under mean ablation:"]
    for effect in document["effects"]:
        if effect["step"] == center_step(document):
            kept, left = effect["faithfulness_of_named_set"], effect["completeness_of_named_set"]
            shown = f"{interval(kept)}, {interval(left)}  {' '.join(effect['named_set'])}"
            lines.append(f"{effect['pair_kind']:<6} {shown}")
    return lines


KIND = Kind("necessity", analyse, summary_lines, settings=("components", "metric"))
