"""Measures the clean pass over one microbatch: all measures without an intervention, as sums per read and sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.execution.states_at_reads import states_at_reads
from kvjax.measure import registry, residual
from kvjax.measure.declaration import LEVEL_AXES, Measure
from kvjax.measure.reads import Reads
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params
from kvjax.model.restart import HEAD_CAPTURE, RESTART_CAPTURE, CleanRun, run_clean
from kvjax.model.sites import STAGE_SITES
from kvjax.task.encoding import RELATION_GROUPS, TOKEN_ROLES, EncodedRecords

Sums = dict[str, jax.Array]

KEPT = (*RESTART_CAPTURE, *HEAD_CAPTURE)
VALUE_LOGITS = "read/value_logits"  # array of the logits of all values at p_e, of which no sums are formed
CLEAN_CAPTURE = tuple(dict.fromkeys((*STAGE_SITES, *KEPT, "pattern")))


def measure_clean(
    params: Params,
    config: DecoderConfig,
    batch: EncodedRecords,
    *,
    key_directions: jax.Array,
    value_ids: jax.Array,
    key_ids: jax.Array,
    num_splits: int,
    keep_value_logits: bool = False,
) -> tuple[Sums, CleanRun, jax.Array]:
    """Measures one checkpoint on one microbatch without an intervention.

    Returns:
      Sums, of every measure that declares how it is computed. Per read: [B, Q]. Per sequence, over its reads or tokens:
      [B], with the axes of the measure's level behind. Beside them `state/prediction`, `state/support`
      [splits, S, D], sums of states over the batch; and `VALUE_LOGITS` [B, Q, values] if they are to be kept.
      The clean run, with what restarts need.
      States [2 S, B, Q, D], see `states_at_reads`.
    """
    logits, clean = run_clean(params, config, batch.tokens, CLEAN_CAPTURE)
    states = states_at_reads(clean.trace, batch)
    reads = Reads(
        params=params,
        config=config,
        trace=clean.trace,
        logits_BxTxV=logits,
        states_GxBxQxD=states,
        tokens_BxT=batch.tokens,
        token_roles_BxT=batch.token_roles,
        num_roles=len(TOKEN_ROLES),
        positions_BxQ=batch.prediction_positions,
        support_positions_BxQ=batch.support_positions,
        answers_BxQ=batch.answers,
        keys_BxQ=batch.keys,
        relations_BxQxT=batch.relations,
        relation_groups=RELATION_GROUPS,
        value_ids=value_ids,
        key_ids=key_ids,
        key_directions_LxHxDxR=key_directions,
    )
    sums: Sums = {}
    for measure in registry.computed():
        found = measure.compute(reads)
        for source, values in zip(measure.sources, found if isinstance(found, tuple) else (found,), strict=True):
            sums[source] = _per_sequence(measure, values, batch.is_read)
    if keep_value_logits:
        sums[VALUE_LOGITS] = reads.logits_BxQxV[..., value_ids]
    in_split_BxZ = (batch.splits[:, None] == jnp.arange(num_splits)[None]) * batch.weights[:, None]
    for where, at_reads in zip(("prediction", "support"), jnp.split(states, 2), strict=True):
        sums[f"state/{where}"] = residual.state_sums(at_reads, batch.is_read, in_split_BxZ)
    return sums, CleanRun(clean.tokens, {name: clean.trace[name] for name in KEPT}), states


def _per_sequence(measure: Measure, values: jax.Array, is_read_BxQ: jax.Array) -> jax.Array:
    """Sums the values of a measure over each sequence's reads, [B, ...]; those of reads and tokens stay as they are."""
    if measure.level in ("read", "token"):
        return values
    batch_axis = 1 if LEVEL_AXES[measure.level] else 0
    shape = [1] * values.ndim
    shape[batch_axis], shape[-1] = is_read_BxQ.shape
    summed = jnp.sum(jnp.where(is_read_BxQ.reshape(shape), values, 0), axis=-1)
    return jnp.moveaxis(summed, batch_axis, 0)
