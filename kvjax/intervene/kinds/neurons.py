"""Every neuron ablated alone, how much it writes and attributes, and the spectra of heads' matrices.

Ablating a neuron leaves everything before its layer's end as it was, and changes the residual stream there by its
activation times its output weights: one restart from the next block for each, exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from kvjax.devices import Placement
from kvjax.execution.over_checkpoints import checkpoints_of, over_chunks, stack_trees
from kvjax.execution.unbucket import unbucket
from kvjax.intervene.inputs import InterventionInputs, Outcome, number
from kvjax.intervene.kinds.kind import Kind
from kvjax.intervene.summary_text import cell, center_step
from kvjax.measure import behaviour
from kvjax.measure.attribution import answer_direction
from kvjax.measure.statistics import places
from kvjax.measure.weight_spectra import effective_rank, head_spectra
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.interventions import Edit
from kvjax.model.params import Params
from kvjax.model.restart import RESTART_CAPTURE, restart, run_clean
from kvjax.model.sites import take_positions
from kvjax.model.transforms import over_checkpoints, over_layers
from kvjax.model.weights import HEAD_MATRICES, mlp_output_kernels
from kvjax.task.encoding import EncodedRecords, bucket_by_length

TOP_NEURONS = 20

Effects = dict[str, jax.Array]


def neuron_effects(
    params: Params, config: DecoderConfig, batch: EncodedRecords, *, horizon: int, value_ids: jax.Array
) -> Effects:
    """Sums what every neuron does over the reads of each sequence.

    Args:
      params, config: one checkpoint.
      batch: a microbatch of the probe set.
      horizon: positions from this one on affect no read.
      value_ids: token ids of values.

    Returns:
      [B, L, F] each: `correct` and `margin` under the neuron's zero ablation, `activation` (its absolute value at p_e)
      and `direct_logit_attribution` (logits); and `clean_correct`, `clean_margin` [B].
    """
    tokens = jnp.asarray(batch.tokens)
    logits, clean = run_clean(params, config, tokens, (*RESTART_CAPTURE, "mlp_hidden"))
    clean = clean.cut(horizon)
    positions = batch.prediction_positions
    hidden_LxBxTxF = clean.at("mlp_hidden")
    kernel_LxFxD = jnp.asarray(mlp_output_kernels(params))

    def answers(read: jax.Array) -> Effects:
        per_read = {
            "correct": behaviour.answer_correct(read, batch.answers),
            "margin": behaviour.answer_margin(read, batch.answers, value_ids),
        }
        return {name: jnp.sum(jnp.where(batch.is_read, x, 0.0), axis=-1) for name, x in per_read.items()}

    def without(layer: jax.Array | int, neuron: jax.Array) -> Effects:
        activation = jax.lax.dynamic_index_in_dim(hidden_LxBxTxF[layer], neuron, 2, keepdims=True)
        value = clean.at("post_mlp", layer) - activation * kernel_LxFxD[layer, neuron][None, None]
        mask = (jnp.arange(config.n_layers) == layer)[:, None, None, None]
        edits = {"post_mlp": Edit(mask, value[None])}
        return answers(restart(params, config, clean, edits, layer=layer, positions_BxQ=positions))

    def of_layer(layer: jax.Array | int) -> Effects:
        return jax.lax.map(lambda neuron: without(layer, neuron), jnp.arange(config.d_ff))

    found = over_layers(of_layer, config.n_layers)
    at_reads = jax.vmap(lambda x: take_positions(x, positions, 1))(hidden_LxBxTxF)  # [L, B, Q, F]
    final = take_positions(clean.at("post_mlp", config.n_layers - 1), positions, 1)
    direction_BxQxD = answer_direction(params, final, jnp.asarray(batch.answers), value_ids)
    towards = jnp.einsum("lfd,bqd->lbqf", kernel_LxFxD, direction_BxQxD, precision="highest")
    written = {"activation": jnp.abs(at_reads), "direct_logit_attribution": at_reads * towards}
    counted = batch.is_read[None, :, :, None]
    result = {name: jnp.moveaxis(x, -1, 0) for name, x in found.items()}
    result |= {n: jnp.sum(jnp.where(counted, x, 0.0), axis=2).swapaxes(0, 1) for n, x in written.items()}
    return result | {f"clean_{name}": x for name, x in answers(take_positions(logits, positions, 1)).items()}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def neuron_sums(
    config: DecoderConfig,
    horizon: int,
    value_ids: tuple[int, ...],
    devices: int,
    stacked: Params,
    batches: EncodedRecords,
) -> Effects:
    """Measures `neuron_effects` of every microbatch, [C, microbatch, B, …], the checkpoints shared among devices."""

    def one_checkpoint(params: Params, batches: EncodedRecords) -> Effects:
        measure = functools.partial(neuron_effects, params, config, horizon=horizon, value_ids=np.array(value_ids))
        return jax.lax.map(measure, batches)

    return over_checkpoints(one_checkpoint, Placement(devices))(stacked, batches)


def analyse(inputs: InterventionInputs) -> Outcome:
    """Measures every neuron's exact ablation, write strength and attribution on the probe set, and head spectra."""
    buckets = bucket_by_length(inputs.records, tokens_per_batch=inputs.record_tokens_per_batch)
    value_ids = tuple(inputs.vocabulary.value_ids.tolist())
    devices = min(inputs.devices, len(inputs.steps))

    def dispatch(trees: list[Params]) -> list[Effects]:
        chunk = stack_trees(trees)
        return [
            neuron_sums(inputs.config, bucket.horizon, value_ids, devices, chunk, bucket.batches) for bucket in buckets
        ]

    chunks = over_chunks(dispatch, checkpoints_of(inputs.stacked), size=devices, in_flight=0)
    collected = [unbucket(chunk.outputs, buckets, len(inputs.records)) for chunk in chunks]
    arrays = {name: np.concatenate([x[name] for x in collected]) for name in collected[0]}
    reads = float(inputs.records.is_read.sum())
    dataset = xr.Dataset(coords={"step": list(inputs.steps), "layer": np.arange(inputs.config.n_layers)})
    dims = ("step", "layer", "neuron")
    clean = {name: arrays[f"clean_{name}"].sum(axis=1)[:, None, None] for name in ("correct", "margin")}
    lost = {name: (clean[name] - arrays[name].sum(axis=1, dtype=np.float64)) / reads for name in clean}
    out = np.linalg.norm(np.asarray(mlp_output_kernels(inputs.stacked)), axis=-1)  # [C, L, F]
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
    spectra = [head_spectra(inputs.checkpoint(c), inputs.config.n_heads) for c in range(len(inputs.steps))]
    per_head = ("step", "layer", "head")
    for index, name in enumerate(HEAD_MATRICES):
        values = np.stack([of_checkpoint.values[index] for of_checkpoint in spectra])
        dataset[f"{name}_singular_values"] = ((*per_head, "singular_value"), values, {"units": "1"})
        dataset[f"{name}_effective_rank"] = (per_head, effective_rank(values), {"units": "1"})
    effects = []
    for c, step in enumerate(inputs.steps):
        drops = lost["margin"][c]
        for index in np.argsort(-np.abs(drops).ravel(), kind="stable")[:TOP_NEURONS]:
            layer, neuron = (int(i) for i in np.unravel_index(index, drops.shape))
            row = {name: number(values[c, layer, neuron]) for name, (values, _, _) in columns.items()}
            effects.append({"step": step, "layer": layer, "neuron": neuron, **row})
    return Outcome(dataset, {"baseline": {}, "effects": effects, "controls": {}})


def neuron_rows(dataset: xr.Dataset) -> list[dict[str, Any]]:
    """Makes a row per step and neuron for `component_candidates/neurons.jsonl`; ranks are by margin drop."""
    rows = []
    names = ("accuracy_drop", "margin_drop", "write_strength", "direct_logit_attribution")
    for c, step in enumerate(dataset["step"].values.tolist()):
        values = {name: dataset[name].values[c] for name in names}
        ranks = places(values["margin_drop"])
        for layer, neuron in np.ndindex(*ranks.shape):
            own = {name: number(x[layer, neuron]) for name, x in values.items()}
            rows.append({"step": step, "layer": layer, "neuron": neuron, **own, "rank": int(ranks[layer, neuron])})
    return rows


def summary_lines(document: Mapping[str, Any]) -> list[str]:
    """Writes the neurons whose ablation moves the margin most."""
    lines = ["neurons whose ablation moves the margin most (margin drop, accuracy drop):"]
    own = [e for e in document["effects"] if e["step"] == center_step(document)][:6]
    for e in own:
        drops = f"{cell(e['margin_drop'], '7.3f')} {cell(e['accuracy_drop'], '7.3f')}"
        lines.append(f"layer {e['layer']} neuron {e['neuron']:<4} {drops}")
    return lines


KIND = Kind("neurons", analyse, summary_lines, neuron_rows=neuron_rows)
