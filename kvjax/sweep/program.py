"""The sweep's program: everything measured on one checkpoint, reduced on the device to sums per sequence or read."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.measure import behaviour, heads, mlps, residual
from kvjax.model.decoder import Decoder, DecoderConfig, Params
from kvjax.model.interventions import Interventions, ablate_head, ablate_mlp
from kvjax.model.sites import STAGE_SITES, residual_stages, take_positions
from kvjax.model.transforms import Lift, over_checkpoints, over_interventions
from kvjax.sweep.engine import RESTART_CAPTURE, CleanRun, RestartSite, restart, run_clean
from kvjax.task.encoding import EncodedRecords

Sums = dict[str, jax.Array]

CLEAN_CAPTURE = tuple(dict.fromkeys((*STAGE_SITES, *RESTART_CAPTURE, "pattern")))


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiled sweep is made for; hashable.

    Attributes:
      config: the model's shape.
      value_ids, key_ids: token ids of values and keys.
      num_splits: number of splits the records are in.
      ablate: whether to measure every head and MLP ablation, or the clean run's behaviour alone.
      interventions: how interventions of one layer are run, `map` (one by one) or `vmap`.
      checkpoints: how checkpoints are run.
    """

    config: DecoderConfig
    value_ids: tuple[int, ...]
    key_ids: tuple[int, ...]
    num_splits: int
    ablate: bool = True
    interventions: Lift = "map"
    checkpoints: Lift = "map"


@functools.partial(jax.jit, static_argnums=0)
def measure_checkpoints(program: Program, stacked_params: Params, batches: EncodedRecords) -> Sums:
    """Returns everything measured on stacked checkpoints over the microbatches of one bucket.

    Args:
      program: the static settings.
      stacked_params: parameters with a leading checkpoint axis C.
      batches: arrays [microbatch, B, …].

    Returns:
      Sums [C, microbatch, …], see `measure_batch`.
    """

    def one_checkpoint(params: Params, batches: EncodedRecords) -> Sums:
        return jax.lax.map(functools.partial(measure_batch, program, params), batches)

    return over_checkpoints(one_checkpoint, lift=program.checkpoints)(stacked_params, batches)


def measure_batch(program: Program, params: Params, batch: EncodedRecords) -> Sums:
    """Returns everything measured on one checkpoint over one microbatch.

    Returns:
      Per read, [B, Q]: `read/correct`, `read/margin` (logits), `read/entropy` (nats), `read/confidence`, `read/q`,
      `read/r`, `read/key_selectivity`, `read/recency_selectivity`.
      Per sequence, summed over its reads or tokens: `token/loss` [B] (nats), `token/role_correct` [B, roles],
      `lens/…` [B, S], `head/<attention measure>` [B, L, H], `mlp/write_norm`, `mlp/write_norm_support` [B, L];
      with ablations also `head/zero/correct`, `head/zero/margin` [B, L, H] and the same of `mlp/zero` [B, L].
      Summed over the batch, by split: `state/prediction`, `state/support` [splits, S, D].
    """
    config, value_ids, key_ids = program.config, jnp.array(program.value_ids), jnp.array(program.key_ids)
    clean = run_clean(params, config, batch.tokens, CLEAN_CAPTURE)
    positions, is_read = batch.prediction_positions, batch.is_read
    logits_BxQxV = take_positions(clean.logits, positions, 1)
    margin, _ = behaviour.answer_margin(logits_BxQxV, batch.answers, value_ids)
    entropy, confidence = behaviour.answer_distribution(logits_BxQxV, batch.answers)
    attention = heads.attention_per_read(clean.trace["pattern"], positions, batch.support_positions, batch.relations)
    key_selectivity, recency_selectivity = behaviour.selectivities(
        attention["current_value_attention"], attention["key"], attention["value"]
    )
    loss, role_correct = behaviour.next_token_sums(clean.logits, batch.tokens, batch.token_roles)
    sums: Sums = {
        "read/correct": behaviour.answer_correct(logits_BxQxV, batch.answers),
        "read/margin": margin,
        "read/entropy": entropy,
        "read/confidence": confidence,
        "read/q": attention["query_attention"].max(axis=(0, 2)),
        "read/r": attention["support_attention"].max(axis=(0, 2)),
        "read/key_selectivity": key_selectivity,
        "read/recency_selectivity": recency_selectivity,
        "token/loss": loss,
        "token/role_correct": role_correct,
    }
    for name in heads.ATTENTION_MEASURES:
        per_sequence = jnp.sum(jnp.where(is_read[None, :, None], attention[name], 0.0), axis=-1)  # [L, B, H]
        sums[f"head/{name}"] = per_sequence.swapaxes(0, 1)
    sums |= _stage_sums(program, params, clean, batch, value_ids, key_ids)
    if program.ablate:
        sums |= _ablation_sums(program, params, clean, batch, value_ids)
    return sums


def _stage_sums(
    program: Program,
    params: Params,
    clean: CleanRun,
    batch: EncodedRecords,
    value_ids: jax.Array,
    key_ids: jax.Array,
) -> Sums:
    """Returns the logit lens, the state sums and the MLPs' write norms."""

    def at(x_NxBxTxD: jax.Array, positions_BxQ: jax.Array) -> jax.Array:
        return jax.vmap(lambda x: take_positions(x, positions_BxQ, 1))(x_NxBxTxD)

    def lens_logits(states_SxBxQxD: jax.Array) -> jax.Array:
        # The last stage is the final LayerNorm's output already.
        model, variables = Decoder(program.config), {"params": params}
        before = model.apply(variables, states_SxBxQxD[:-1], method=Decoder.read_out)
        after = model.apply(variables, states_SxBxQxD[-1:], method=Decoder.unembed)
        return jnp.concatenate([before, after])

    stages_SxBxTxD = residual_stages(clean.trace)
    at_prediction = at(stages_SxBxTxD, batch.prediction_positions)
    at_support = at(stages_SxBxTxD, batch.support_positions)
    lens = residual.lens_sums(
        lens_logits(at_prediction),
        lens_logits(at_support),
        batch.answers,
        batch.keys,
        batch.is_read,
        value_ids=value_ids,
        key_ids=key_ids,
    )
    in_split = (batch.splits[:, None] == np.arange(program.num_splits)[None]) * batch.weights[:, None]
    mlp_out = clean.trace["mlp_out"]
    return {
        **{f"lens/{name}": x.T for name, x in lens.items()},
        "state/prediction": residual.state_sums(at_prediction, batch.is_read, in_split),
        "state/support": residual.state_sums(at_support, batch.is_read, in_split),
        "mlp/write_norm": mlps.write_norm_sums(at(mlp_out, batch.prediction_positions), batch.is_read).T,
        "mlp/write_norm_support": mlps.write_norm_sums(at(mlp_out, batch.support_positions), batch.is_read).T,
    }


def _ablation_sums(
    program: Program, params: Params, clean: CleanRun, batch: EncodedRecords, value_ids: jax.Array
) -> Sums:
    """Returns right answers and margins under the zero ablation of every head and every MLP."""
    config = program.config
    n_layers, n_heads, last = config.n_layers, config.n_heads, config.n_layers - 1

    def answers_under(edits: Interventions, site: RestartSite, layer: jax.Array | int) -> Sums:
        logits = restart(params, config, clean, edits, site=site, layer=layer, positions_BxQ=batch.prediction_positions)
        margin, _ = behaviour.answer_margin(logits, batch.answers, value_ids)
        correct = behaviour.answer_correct(logits, batch.answers)
        per_read = {"correct": correct, "margin": margin}
        return {name: jnp.sum(jnp.where(batch.is_read, x, 0), axis=-1) for name, x in per_read.items()}

    def heads_of_layer(layer: jax.Array | int) -> Sums:
        def one_head(head: jax.Array) -> Sums:
            edits = ablate_head(layer, head, n_layers=n_layers, n_heads=n_heads)
            return answers_under(edits, "head_z", layer)

        return over_interventions(one_head, lift=program.interventions)(jnp.arange(n_heads))

    def mlp_of_layer(layer: jax.Array | int) -> Sums:
        return answers_under(ablate_mlp(layer, n_layers=n_layers), "mlp_out", layer)

    def every_layer(of_layer) -> Sums:
        # The last layer is a program of its own, at the prediction positions alone. Layers are never run side by
        # side: a batch of mixed restart layers would run from the lowest for all.
        final = jax.tree.map(lambda x: x[None], of_layer(last))
        if last == 0:
            return final
        earlier = jax.lax.map(of_layer, jnp.arange(last))
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), earlier, final)

    results: dict[str, Any] = {"head": every_layer(heads_of_layer), "mlp": every_layer(mlp_of_layer)}
    return {
        f"{kind}/zero/{name}": jnp.moveaxis(x, -1, 0) for kind, result in results.items() for name, x in result.items()
    }
