"""Attribution patching: a first-order screen for activation and path patching, beside the exact effects.

A node's score is the change of its output between the runs times the metric's gradient there; a path's, the change of
the sender's output times the gradient at the receiver's input. Gradients are taken in the base run, or averaged along
the line between the two runs' embeddings (integrated gradients). Nothing before the first changed token differs between
the runs, so that only the positions from there on are differentiated, all nodes and inputs in one backward pass.

Source: Nanda, Attribution patching (2023); Syed et al. (2023); Hanna et al., Have faith in faithfulness (2024).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.execution.over_pairs import PairBatch
from kvjax.intervene.inputs import InterventionInputs, Outcome, number
from kvjax.intervene.kinds import activation_patching, path_patching
from kvjax.intervene.kinds.activation_patching import split_positions
from kvjax.intervene.kinds.kind import Kind
from kvjax.intervene.pair_runs import DENOISING, PairRuns, answer_effects, run_pairs
from kvjax.intervene.paths import all_edges, all_senders, run_changes, sender_changes
from kvjax.intervene.places import component_places, stage_places
from kvjax.intervene.recovery import means_per_read
from kvjax.intervene.summary_text import cell, center_step
from kvjax.measure.statistics import spearman
from kvjax.model.decoder import DecoderConfig, Params
from kvjax.model.restart import window_gradients
from kvjax.model.sites import Trace, take_positions
from kvjax.task.corruption import PAIR_ROLES
from kvjax.task.pair_encoding import EncodedPairs

ESTIMATORS = ("gradient", "integrated_gradients")
INTEGRATION_STEPS = 4

# Outputs of nodes, then inputs of receivers.
_SITES = ("embedding", "head_z", "mlp_out", "query_input", "key_input", "value_input", "mlp_input", "logits_input")


def attribution_scores(
    params: Params, config: DecoderConfig, batch: EncodedPairs, *, window: int, direction: jax.Array | int
) -> dict[str, jax.Array]:
    """Scores the first-order effect on the metric of patching each node and each direct path.

    Returns:
      For each of `ESTIMATORS`: `nodes/<estimator>` [B, senders] and `edges/<estimator>` [B, edges], in the order of
      `all_senders` and `all_edges`; in logits, summed over the affected reads of a pair.
    """
    runs = run_pairs(params, config, batch, direction, window=window)
    change = run_changes(runs, runs.window_BxW)
    changes = sender_changes(params, config, change)  # [senders, B, W, D]
    middles = (jnp.arange(INTEGRATION_STEPS) + 0.5) / INTEGRATION_STEPS
    along = jax.lax.map(lambda share: _gradients(params, config, runs, share), middles)
    gradients = {
        "gradient": _gradients(params, config, runs, jnp.zeros(())),
        "integrated_gradients": jax.tree.map(lambda x: jnp.mean(x, axis=0), along),
    }
    scores = {}
    for estimator, found in gradients.items():
        scores[f"nodes/{estimator}"] = _node_scores(config, changes, change["head_z"], found)
        scores[f"edges/{estimator}"] = _edge_scores(config, changes, found)
    return scores


def _gradients(params: Params, config: DecoderConfig, runs: PairRuns, share: jax.Array) -> Trace:
    """Takes the metric's gradient at every output and input, in the run whose embedding lies `share` of the way."""
    batch, window_BxW = runs.batch, runs.window_BxW
    own, other = (take_positions(run.trace["embedding"], window_BxW, 1) for run in (runs.base, runs.source))
    rows_BxQ = jnp.clip(batch.prediction_positions - window_BxW[:, :1], 0, window_BxW.shape[1] - 1)

    def metric(logits_BxWxV: jax.Array) -> jax.Array:
        return jnp.sum(answer_effects(take_positions(logits_BxWxV, rows_BxQ, 1), batch)["logit_difference"])

    start = own + share * (other - own)
    return window_gradients(params, config, runs.base, start, metric, sites=_SITES, window_BxW=window_BxW)


def _node_scores(config: DecoderConfig, changes: jax.Array, z_change: jax.Array, gradients: Trace) -> jax.Array:
    heads = jnp.sum(z_change * gradients["head_z"], axis=(2, 4))  # [L, B, H]
    by_layer = changes[1:].reshape(config.n_layers, config.n_heads + 1, *changes.shape[1:])
    mlps = jnp.sum(by_layer[:, -1] * gradients["mlp_out"], axis=(2, 3))  # [L, B]
    layers = jnp.concatenate([heads, mlps[..., None]], axis=-1)  # [L, B, H + 1]
    embedding = jnp.sum(changes[0] * gradients["embedding"], axis=(1, 2))
    return jnp.concatenate([embedding[:, None], jnp.moveaxis(layers, 1, 0).reshape(len(embedding), -1)], axis=1)


def _edge_scores(config: DecoderConfig, changes: jax.Array, gradients: Trace) -> jax.Array:
    senders = all_senders(config.n_layers, config.n_heads)
    products = {}
    for site in ("query_input", "key_input", "value_input"):
        products[site] = jnp.einsum("sbtd,lbthd->slhb", changes, gradients[site], precision="highest")
    products["mlp_input"] = jnp.einsum("sbtd,lbtd->slb", changes, gradients["mlp_input"], precision="highest")
    products["logits_input"] = jnp.einsum("sbtd,btd->sb", changes, gradients["logits_input"], precision="highest")
    columns = []
    for sender, receiver in all_edges(config.n_layers, config.n_heads):
        x = products[receiver.site][senders.index(sender)]
        if receiver.site == "mlp_input":
            x = x[receiver.layer]
        elif receiver.site != "logits_input":
            x = x[receiver.layer, receiver.head]
        columns.append(x)
    return jnp.stack(columns, axis=-1)


@dataclasses.dataclass(frozen=True)
class ScoreByGradients:
    """The measurement: first-order scores of every node and path, denoising."""

    config: DecoderConfig

    def __call__(self, params: Params, batch: PairBatch) -> dict[str, jax.Array]:
        """Runs `attribution_scores`."""
        return attribution_scores(params, self.config, batch.pairs, window=batch.window, direction=DENOISING)


def analyse(inputs: InterventionInputs) -> Outcome:
    """Scores every node and path to first order, beside the exact effects, denoising."""
    scores = inputs.over_pairs.run(ScoreByGradients(inputs.config), inputs.stacked)
    places = component_places(inputs.config.n_layers, inputs.config.n_heads)
    everything = tuple((stage_places(inputs.config.n_layers) | places).values())
    nodes = activation_patching.patched(inputs, everything)[DENOISING]
    paths = path_patching.patched(inputs)[DENOISING]
    senders = all_senders(inputs.config.n_layers, inputs.config.n_heads)
    edges = all_edges(inputs.config.n_layers, inputs.config.n_heads)
    dataset = inputs.dataset(
        estimator=ESTIMATORS,
        node=[sender.name for sender in senders],
        path=[f"{edge.sender.name}->{edge.receiver.name}" for edge in edges],
        pair=inputs.pair_ids,
    )
    whole = split_positions(nodes["logit_difference"], len(PAIR_ROLES))[1][..., -1]
    whole = whole[:, :, [0, *(everything.index(place) for place in places.values())]]  # the embedding, then components
    exact = {"nodes": whole - nodes["logit_difference_base"][..., None]}
    exact["edges"] = paths["logit_difference"] - paths["logit_difference_base"][..., None]
    correlations: list[dict[str, Any]] = []
    for what, dim in (("nodes", "node"), ("edges", "path")):
        dims = ("statistic", "pair_kind", "step", dim)
        measured = means_per_read(inputs.groups, exact[what])
        meaning = "change of the metric when patched, mean over reads"
        dataset[f"{dim}_exact"] = (dims, measured, {"long_name": meaning, "units": "logits"})
        screened = np.stack([means_per_read(inputs.groups, scores[f"{what}/{m}"]) for m in ESTIMATORS], axis=1)
        meaning = "first-order estimate of that change, mean over reads"
        dataset[f"{dim}_score"] = (
            ("statistic", "estimator", *dims[1:]),
            screened,
            {"long_name": meaning, "units": "logits"},
        )
        dataset[f"{dim}_score_by_pair"] = (
            ("estimator", "step", "pair", dim),
            np.stack([scores[f"{what}/{m}"] for m in ESTIMATORS]).astype(np.float32),
            {"long_name": f"{meaning}, summed over a pair's reads", "units": "logits"},
        )
        for m, estimator in enumerate(ESTIMATORS):
            for k, kind in enumerate(inputs.groups.kinds):
                for c, step in enumerate(inputs.steps):
                    correlations.append(
                        {
                            "of": what,
                            "estimator": estimator,
                            "pair_kind": kind,
                            "step": step,
                            "rank_correlation": number(spearman(screened[0, m, k, c], measured[0, k, c])),
                        }
                    )
    return Outcome(dataset, {"baseline": {}, "effects": {"rank_correlation_with_exact": correlations}, "controls": {}})


def summary_lines(document: Mapping[str, Any]) -> list[str]:
    """Writes how first-order scores and exact effects correlate by rank."""
    lines = ["rank correlation of first-order scores with exact effects:"]
    for e in document["effects"]["rank_correlation_with_exact"]:
        if e["step"] == center_step(document):
            lines.append(f"{e['of']:<6} {e['estimator']:<21} {e['pair_kind']:<6} {cell(e['rank_correlation'], '5.2f')}")
    return lines


KIND = Kind("attribution", analyse, summary_lines)
