"""Forms the residual states at the reads, which probes are fitted on and checkpoints are compared by."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kvjax.measure.residual import spread
from kvjax.model.decoder import DecoderConfig, Params
from kvjax.model.restart import run_clean
from kvjax.model.sites import STAGE_SITES, Trace, residual_stages, take_positions
from kvjax.task.encoding import EncodedRecords


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReadStates:
    """One checkpoint's states at the reads.

    Attributes:
      values: [G, N, D], G = 2 S: every stage at p_e, then at s_e; N reads, bucket after bucket.
      spread: [G], see `kvjax.measure.residual.spread`; every comparison of these states needs it.
    """

    values: jax.Array
    spread: jax.Array

    @classmethod
    def of(cls, values_GxNxD: jax.Array, buckets: tuple[EncodedRecords, ...]) -> ReadStates:
        """Measures the spread of states."""
        return cls(values_GxNxD, spread_of_states(values_GxNxD, buckets))


def spread_of_states(values_GxNxD: jax.Array, buckets: tuple[EncodedRecords, ...]) -> jax.Array:
    """Measures the spread of one checkpoint's states: [G]."""
    counted = counted_reads(buckets)
    # One stage after another: centred copies of all would be as large as the states themselves.
    return jax.lax.map(lambda x: spread(x[None], counted)[0], values_GxNxD)


def states_at_reads(trace: Trace, batch: EncodedRecords) -> jax.Array:
    """Takes every stage's states at p_e and at s_e of each read: [2 S, B, Q, D], all stages at p_e first."""
    stages_SxBxTxD = residual_stages(trace)

    def at(positions_BxQ: jax.Array) -> jax.Array:
        return jax.vmap(lambda x: take_positions(x, positions_BxQ, 1))(stages_SxBxTxD)

    return jnp.concatenate([at(batch.prediction_positions), at(batch.support_positions)])


@functools.partial(jax.jit, static_argnums=0)
def form_states(config: DecoderConfig, params: Params, buckets: tuple[EncodedRecords, ...]) -> jax.Array:
    """Runs a checkpoint on the probe set and returns its states at all reads, bucket after bucket: [2 S, N, D]."""
    config = dataclasses.replace(config, tied="unembedding" not in params)  # as the checkpoint has it

    def of_batch(batch: EncodedRecords) -> jax.Array:
        _, clean = run_clean(params, config, batch.tokens, STAGE_SITES)
        return states_at_reads(clean.trace, batch)

    return jnp.concatenate([flatten_reads(jax.lax.map(of_batch, batches)) for batches in buckets], axis=1)


def flatten_reads(states_MxGxBxQxD: jax.Array) -> jax.Array:
    """Puts the states of all microbatches' reads on one axis: [G, M B Q, D]."""
    by_group = jnp.moveaxis(states_MxGxBxQxD, 1, 0)
    return by_group.reshape(by_group.shape[0], -1, by_group.shape[-1])


def counted_reads(buckets: tuple[EncodedRecords, ...]) -> jax.Array:
    """Marks the rows that are reads of a record rather than padding, bool [N]."""
    return of_reads(buckets, lambda batch: batch.is_read & (batch.weights > 0)[..., None])


def of_reads(buckets: tuple[EncodedRecords, ...], of: Callable[[EncodedRecords], jax.Array]) -> jax.Array:
    """Collects the values of `of` for every read, bucket after bucket: [N]."""
    return jnp.concatenate([of(batch).reshape(-1) for batch in buckets])
