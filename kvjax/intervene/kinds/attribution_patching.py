"""Attribution patching: a first-order screen for activation and path patching, beside the exact effects they stored.

A node's score is the change of its output between the runs times the metric's gradient there; a path's, the change of
the sender's output times the gradient at the receiver's input. Gradients are taken in the base run, or averaged along
the line between the two runs' embeddings (integrated gradients). Nothing before the first changed token differs between
the runs, so that only the positions from there on are differentiated, all nodes and inputs in one backward pass.

Source: Nanda, Attribution patching (2023); Syed et al. (2023); Hanna et al., Have faith in faithfulness (2024).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from kvjax.execution.over_pairs import PairBatch
from kvjax.intervene.inputs import InterventionInputs, Outcome, number, numbers
from kvjax.intervene.kinds.kind import Kind
from kvjax.intervene.metrics import DEFAULT_METRIC, METRICS
from kvjax.intervene.pair_runs import DENOISING, DIRECTIONS, answer_effects, run_pairs, with_runs
from kvjax.intervene.pair_tables import TOP, baselines, put_runs
from kvjax.intervene.paths import HEAD_INPUTS, Edge, Receiver, all_edges, all_senders, run_changes, sender_changes
from kvjax.intervene.recovery import PairGroups, means_per_read
from kvjax.intervene.summary_text import cell, center_step
from kvjax.measure.statistics import spearman
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params
from kvjax.model.sites import Trace, take_positions
from kvjax.model.window_gradients import WindowGradients, window_gradients
from kvjax.task.pair_encoding import EncodedPairs

# The kinds that store the exact effects of nodes and of paths.
READS = ("activation_patching", "path_patching")
_DIMS = {"nodes": "node", "edges": "path"}

ESTIMATORS = ("gradient", "integrated_gradients")
_RANKED_BY = "integrated_gradients"
INTEGRATION_STEPS = 4


def attribution_scores(
    params: Params,
    config: DecoderConfig,
    batch: EncodedPairs,
    *,
    window: int,
    direction: jax.Array | int,
    metric: str = DEFAULT_METRIC,
) -> dict[str, jax.Array]:
    """Scores the first-order effect on a metric of patching each node and each direct path.

    Returns:
      For each of `ESTIMATORS`: `nodes/<estimator>` [B, senders] and `edges/<estimator>` [B, edges], in the order of
      `all_senders` and `all_edges`; in units of the metric, summed over the affected reads of a pair. Beside them
      `<name>_base`, `<name>_source` [B] of `answer_effects`.
    """
    runs = run_pairs(params, config, batch, direction, window=window)
    change = run_changes(runs, runs.window_BxW)
    changes_BxSxWxD = sender_changes(params, config, change).swapaxes(0, 1)
    own, other = (take_positions(run.trace["embedding"], runs.window_BxW, 1) for run in (runs.base, runs.source))

    def of_metric(logits_BxQxV: jax.Array) -> jax.Array:
        return jnp.sum(answer_effects(logits_BxQxV, batch)[metric])

    def scored(share: jax.Array) -> dict[str, jax.Array]:
        """Scores by the gradients in the run whose embedding lies `share` of the way from the base to the source."""
        at = {"positions_BxQ": batch.prediction_positions, "window_BxW": runs.window_BxW}
        gradients = window_gradients(params, config, runs.base, own + share * (other - own), of_metric, **at)
        return {
            "nodes": _node_scores(config, changes_BxSxWxD, change["head_z"], gradients.outputs),
            "edges": _edge_scores(params, config, changes_BxSxWxD, gradients),
        }

    middles = (np.arange(INTEGRATION_STEPS) + 0.5) / INTEGRATION_STEPS
    # The base run's own gradients, then those along the line: one compiled loop.
    found = jax.lax.map(scored, jnp.array([0.0, *middles], own.dtype))
    scores = {}
    for what, along in found.items():
        scores[f"{what}/gradient"] = along[0]
        scores[f"{what}/integrated_gradients"] = jnp.mean(along[1:], axis=0)
    return with_runs(scores, runs)


def _node_scores(config: DecoderConfig, changes_BxSxWxD: jax.Array, z_change: jax.Array, gradients: Trace) -> jax.Array:
    heads = jnp.sum(z_change * gradients["head_z"], axis=(2, 4))  # [L, B, H]
    by_layer = changes_BxSxWxD[:, 1:].reshape(len(changes_BxSxWxD), config.n_layers, -1, *changes_BxSxWxD.shape[2:])
    mlps = jnp.sum(by_layer[:, :, -1] * jnp.moveaxis(gradients["mlp_out"], 0, 1), axis=(2, 3))  # [B, L]
    layers = jnp.concatenate([jnp.moveaxis(heads, 1, 0), mlps[..., None]], axis=-1)  # [B, L, H + 1]
    embedding = jnp.sum(changes_BxSxWxD[:, 0] * gradients["embedding"], axis=(1, 2))
    return jnp.concatenate([embedding[:, None], layers.reshape(len(embedding), -1)], axis=1)


def _edge_scores(
    params: Params, config: DecoderConfig, changes_BxSxWxD: jax.Array, gradients: WindowGradients
) -> jax.Array:
    senders = all_senders(config.n_layers, config.n_heads)
    parts, places = [], {}

    def put(receivers: Sequence[Receiver], reach: int, products: Callable[[jax.Array], jax.Array]) -> None:
        """Keeps the products of the first `reach` senders with some receivers, and says where each lies."""
        done = sum(part.shape[1] for part in parts)
        each = itertools.product(senders[:reach], receivers)
        places.update({Edge(*edge): done + number for number, edge in enumerate(each)})
        parts.append(products(changes_BxSxWxD[:, :reach]).reshape(len(changes_BxSxWxD), -1))

    for layer in range(config.n_layers):
        before = sum(sender.layer < layer for sender in senders)
        inputs = [Receiver(site, layer, head) for site in HEAD_INPUTS for head in range(config.n_heads)]
        put(inputs, before, functools.partial(gradients.of_heads, params, config, layer))
        # A head reaches the MLP of its own layer.
        of_mlp = functools.partial(gradients.of_mlp, params, layer)
        put([Receiver("mlp_input", layer)], before + config.n_heads, of_mlp)
    put([Receiver("logits_input")], len(senders), functools.partial(gradients.of_logits, params))
    order = np.array([places[edge] for edge in all_edges(config.n_layers, config.n_heads)])
    return jnp.concatenate(parts, axis=1)[:, order]


@dataclasses.dataclass(frozen=True)
class ScoreByGradients:
    """The measurement: first-order scores of every node and path, denoising."""

    config: DecoderConfig
    metric: str = DEFAULT_METRIC

    def __call__(self, params: Params, batch: PairBatch) -> dict[str, jax.Array]:
        """Runs `attribution_scores`."""
        at = {"window": batch.window, "direction": DENOISING, "metric": self.metric}
        return attribution_scores(params, self.config, batch.pairs, **at)


def analyse(inputs: InterventionInputs) -> Outcome:
    """Scores every node and path to first order, denoising."""
    scores = inputs.over_gradients.run(ScoreByGradients(inputs.config, inputs.metric), inputs.stacked)
    edges = all_edges(inputs.config.n_layers, inputs.config.n_heads)
    dataset = inputs.dataset(
        estimator=ESTIMATORS,
        node=[sender.name for sender in all_senders(inputs.config.n_layers, inputs.config.n_heads)],
        path=[f"{edge.sender.name}->{edge.receiver.name}" for edge in edges],
        pair=inputs.pair_ids,
    )
    dataset.attrs["metric"], units = inputs.metric, METRICS[inputs.metric].units
    for what, dim in _DIMS.items():
        own = [scores[f"{what}/{estimator}"] for estimator in ESTIMATORS]
        meaning = "first-order estimate of the change of the metric when patched"
        dims = ("statistic", "estimator", "pair_kind", "step", dim)
        of_kinds = np.stack([means_per_read(inputs.groups, x) for x in own], axis=1)
        dataset[f"{dim}_score"] = (dims, of_kinds, {"long_name": f"{meaning}, mean over reads", "units": units})
        dataset[f"{dim}_score_by_pair"] = (
            ("estimator", "step", "pair", dim),
            np.stack(own).astype(np.float32),
            {"long_name": f"{meaning}, summed over a pair's reads", "units": units},
        )
    put_runs(dataset, inputs, scores, clean="source", corrupted="base")
    return Outcome(dataset, {})


def beside_exact(scores: xr.Dataset, stored: Mapping[str, xr.Dataset], groups: PairGroups) -> Outcome:
    """Puts the exact effects that other kinds stored beside the scores, with the rank correlation of the two.

    Args:
      scores: the arrays of `analyse`; exact effects in them are replaced.
      stored: the arrays of `READS` by kind, of the same pairs and checkpoints; effects of a missing one are left out.
      groups: the pairs.
    """
    metric = scores.attrs["metric"]
    dataset = scores.drop_vars([f"{dim}_exact" for dim in _DIMS.values()], errors="ignore")
    effects: dict[str, Any] = {"rank_correlation_with_exact": []}
    for (what, dim), kind in zip(_DIMS.items(), READS, strict=True):
        if kind in stored:
            changes = _exact_changes(stored[kind].sel(metric=metric), dim, dataset[dim].values)
            meaning = "change of the metric when patched, mean over reads"
            dims = ("statistic", "pair_kind", "step", dim)
            measured = means_per_read(groups, changes)
            dataset[f"{dim}_exact"] = (dims, measured, {"long_name": meaning, "units": METRICS[metric].units})
            effects["rank_correlation_with_exact"] += _rank_correlations(dataset, what, dim)
        effects[what] = _largest(dataset, dim)
    missing = [kind for kind in READS if kind not in stored]
    summary = {"effects": effects, "controls": {}, "missing": missing}
    return Outcome(dataset, baselines(dataset, metric) | summary)


def _exact_changes(stored: xr.Dataset, dim: str, names: np.ndarray) -> np.ndarray:
    """Reads how much the metric of each pair changes if a node or path is patched, denoising: [C, N, names]."""
    if dim == "path":
        patched = stored["metric_by_path"].sel(direction=DIRECTIONS[DENOISING], path=names)
    else:
        patched = stored["metric_by_role"].sel(direction=DIRECTIONS[DENOISING], position_role="all", place=names)
    changes = patched - stored["metric_corrupted"]
    return changes.transpose("step", "pair", ...).values


def _rank_correlations(dataset: xr.Dataset, what: str, dim: str) -> list[dict[str, Any]]:
    score, exact = (dataset[f"{dim}_{name}"].sel(statistic="estimate") for name in ("score", "exact"))
    return [
        {
            "of": what,
            "estimator": estimator,
            "pair_kind": kind,
            "step": int(step),
            "rank_correlation": number(
                spearman(
                    score.sel(estimator=estimator, pair_kind=kind, step=step).values,
                    exact.sel(pair_kind=kind, step=step).values,
                )
            ),
        }
        for estimator in ESTIMATORS
        for kind in dataset["pair_kind"].values.tolist()
        for step in dataset["step"].values
    ]


def _largest(dataset: xr.Dataset, dim: str) -> list[dict[str, Any]]:
    """Lists the nodes or paths of the largest scores for each kind of pair and step, with the exact effects."""
    rows = []
    for kind in dataset["pair_kind"].values.tolist():
        for step in dataset["step"].values:
            at = dataset[[name for name in (f"{dim}_score", f"{dim}_exact") if name in dataset]]
            at = at.sel(pair_kind=kind, step=step)
            ranked = at[f"{dim}_score"].sel(statistic="estimate", estimator=_RANKED_BY).values
            for index in np.argsort(-np.abs(ranked), kind="stable")[:TOP]:
                own = at.isel({dim: index})
                score = own[f"{dim}_score"]
                row = {"pair_kind": kind, "step": int(step), dim: str(own[dim].values)}
                row["score"] = {estimator: numbers(score.sel(estimator=estimator).values) for estimator in ESTIMATORS}
                row["exact"] = numbers(own[f"{dim}_exact"].values) if f"{dim}_exact" in own else None
                rows.append(row)
    return rows


def summary_lines(document: Mapping[str, Any]) -> list[str]:
    """Writes the largest scores beside the exact effects, and how the two correlate by rank."""
    effects, center = document["effects"], center_step(document)
    metric = document["metric"]
    lines = [f"first-order scores, {metric} at step {center}, exact effects in brackets, the largest by kind of pair:"]
    for kind in document["pairs"]["counts"]:
        for what, dim in _DIMS.items():
            own = [e for e in effects[what] if (e["pair_kind"], e["step"]) == (kind, center)][:3]
            lines.append(f"{kind:<6} {what:<5} {'; '.join(_scored(e, dim) for e in own)}")
    if effects["rank_correlation_with_exact"]:
        lines.append("rank correlation of first-order scores with exact effects:")
    for e in effects["rank_correlation_with_exact"]:
        if e["step"] == center:
            lines.append(f"{e['of']:<6} {e['estimator']:<21} {e['pair_kind']:<6} {cell(e['rank_correlation'], '5.2f')}")
    if missing := document["missing"]:
        adds = ",".join([*missing, document["kind"]])
        lines.append(f"no exact effects of {_listed(missing)} are stored for these pairs and checkpoints:")
        lines.append(f"the same call with --kinds={adds} adds them")
    return lines


def _scored(effect: Mapping[str, Any], dim: str) -> str:
    exact = effect["exact"]["estimate"] if effect["exact"] is not None else None
    return f"{effect[dim]} {cell(effect['score'][_RANKED_BY]['estimate'], '.2f')} [{cell(exact, '.2f')}]"


def _listed(kinds: Sequence[str]) -> str:
    return " and ".join(kind.replace("_", " ") for kind in kinds)


KIND = Kind("attribution", analyse, summary_lines, settings=("metric",), reads=READS, beside=beside_exact)
