"""Measures the clean pass over one microbatch: all measures without an intervention, as sums per read and sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.execution.states_at_reads import states_at_reads
from kvjax.measure import attribution, behaviour, heads, mlps, registry, residual
from kvjax.measure.reads import Reads
from kvjax.model.decoder import Decoder, DecoderConfig, Params
from kvjax.model.restart import HEAD_CAPTURE, RESTART_CAPTURE, CleanRun, run_clean
from kvjax.model.sites import STAGE_SITES, Trace, take_positions
from kvjax.task.encoding import RELATION_GROUPS, TOKEN_ROLES, EncodedRecords

Sums = dict[str, jax.Array]

KEPT = (*RESTART_CAPTURE, *HEAD_CAPTURE)
CLEAN_CAPTURE = tuple(dict.fromkeys((*STAGE_SITES, *KEPT, "pattern")))


def measure_clean(
    params: Params,
    config: DecoderConfig,
    batch: EncodedRecords,
    *,
    value_ids: jax.Array,
    key_ids: jax.Array,
    num_splits: int,
) -> tuple[Sums, CleanRun, jax.Array]:
    """Measures one checkpoint on one microbatch without an intervention.

    Returns:
      Sums. Per read, [B, Q]: `read/…` of every measure that declares it. Per sequence, over its reads or tokens:
      `token/loss` [B] (nats), `token/role_correct` [B, roles], `lens/…` [B, S], `head/…` [B, L, H],
      `mlp/write_norm`, `mlp/write_norm_support` [B, L], `attribution/…` [B], [B, L] or [B, L, H] (logits). Summed over
      the batch, by split: `state/prediction`, `state/support` [splits, S, D].
      The clean run, with what restarts need.
      States [2 S, B, Q, D], see `states_at_reads`.
    """
    logits, clean = run_clean(params, config, batch.tokens, CLEAN_CAPTURE)
    trace, positions = clean.trace, batch.prediction_positions
    logits_BxQxV = take_positions(logits, positions, 1)
    attention = heads.attention_per_read(
        trace["pattern"], positions, batch.support_positions, batch.relations, RELATION_GROUPS
    )
    reads = Reads(logits_BxQxV, batch.answers, value_ids, attention)
    loss, role_correct = behaviour.next_token_sums(logits, batch.tokens, batch.token_roles, num_roles=len(TOKEN_ROLES))
    states = states_at_reads(trace, batch)
    sums: Sums = {"token/loss": loss, "token/role_correct": role_correct}
    for measure in registry.computed("read"):
        sums[measure.sources[0]] = measure.compute(reads)
    for measure in registry.computed("head"):
        per_read = measure.compute(reads)  # [L, B, H, Q]
        per_sequence = jnp.sum(jnp.where(batch.is_read[None, :, None], per_read, 0.0), axis=-1)
        sums[measure.sources[0]] = per_sequence.swapaxes(0, 1)
    sums |= _stage_sums(params, config, states, batch, value_ids=value_ids, key_ids=key_ids, num_splits=num_splits)
    sums |= _component_sums(params, trace, batch, value_ids)
    return sums, CleanRun(clean.tokens, {name: trace[name] for name in KEPT}), states


def _stage_sums(
    params: Params,
    config: DecoderConfig,
    states_GxBxQxD: jax.Array,
    batch: EncodedRecords,
    *,
    value_ids: jax.Array,
    key_ids: jax.Array,
    num_splits: int,
) -> Sums:
    """Sums the logit lens and the states."""

    def lens_logits(states_SxBxQxD: jax.Array) -> jax.Array:
        # The last stage is the final LayerNorm's output already.
        model, variables = Decoder(config), {"params": params}
        before = model.apply(variables, states_SxBxQxD[:-1], method=Decoder.read_out)
        after = model.apply(variables, states_SxBxQxD[-1:], method=Decoder.unembed)
        return jnp.concatenate([before, after])

    at_prediction, at_support = jnp.split(states_GxBxQxD, 2)
    lens = residual.lens_sums(
        lens_logits(at_prediction),
        lens_logits(at_support),
        batch.answers,
        batch.keys,
        batch.is_read,
        value_ids=value_ids,
        key_ids=key_ids,
    )
    in_split = (batch.splits[:, None] == jnp.arange(num_splits)[None]) * batch.weights[:, None]
    return {
        **{f"lens/{name}": x.T for name, x in lens.items()},
        "state/prediction": residual.state_sums(at_prediction, batch.is_read, in_split),
        "state/support": residual.state_sums(at_support, batch.is_read, in_split),
    }


def _component_sums(params: Params, trace: Trace, batch: EncodedRecords, value_ids: jax.Array) -> Sums:
    """Sums the MLPs' write norms and every component's direct logit attribution."""

    def at(name: str, positions_BxQ: jax.Array) -> jax.Array:
        return jax.vmap(lambda x: take_positions(x, positions_BxQ, 1))(trace[name])

    def over_reads(x: jax.Array, read_axis: int) -> jax.Array:
        shape = [1] * x.ndim
        shape[read_axis - 1 : read_axis + 1] = batch.is_read.shape
        summed = jnp.sum(jnp.where(batch.is_read.reshape(shape), x, 0.0), axis=read_axis)
        return jnp.moveaxis(summed, read_axis - 1, 0)

    at_reads = {name: at(name, batch.prediction_positions) for name in ("head_z", "mlp_out", "post_mlp")}
    at_reads["embedding"] = take_positions(trace["embedding"], batch.prediction_positions, 1)
    terms = attribution.direct_logit_attribution(params, at_reads, batch.answers, value_ids)
    return {
        "mlp/write_norm": mlps.write_norm_sums(at_reads["mlp_out"], batch.is_read).T,
        "mlp/write_norm_support": mlps.write_norm_sums(at("mlp_out", batch.support_positions), batch.is_read).T,
        **{f"attribution/{name}": over_reads(terms[name], 1) for name in attribution.WHOLE_TERMS},
        **{f"attribution/{name}": over_reads(terms[name], 2) for name in attribution.LAYER_TERMS},
    }
