"""Forms the residual states at the reads, which probes are fitted on and checkpoints are compared by."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.measure.residual import spread
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params
from kvjax.model.restart import run_clean
from kvjax.model.sites import STAGE_SITES, Trace, residual_stages, take_positions
from kvjax.task.encoding import Bucket, EncodedRecords


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReadStates:
    """One checkpoint's states at the reads.

    Attributes:
      values: [G, N, D], G = 2 S: every stage at p_e, then at s_e; N reads, bucket after bucket.
      spread: [G, 1 + Z] of all reads and of each split's, see `kvjax.measure.residual.spread`; every comparison of
        these states needs it.
    """

    values: jax.Array
    spread: jax.Array

    @classmethod
    def of(cls, values_GxNxD: jax.Array, rows_ZxM: jax.Array) -> ReadStates:
        """Measures the spread of states; for `rows_ZxM` see `rows_of_splits`."""
        return cls(values_GxNxD, spread_of_states(values_GxNxD, rows_ZxM))


def rows_of_splits(buckets: Sequence[Bucket], num_splits: int) -> np.ndarray:
    """Lists the rows of `ReadStates` that hold each split's reads, int32 [Z, M]; rows behind its last are -1."""
    batches = [bucket.batches for bucket in buckets]
    counted = [(batch.is_read & (batch.weights > 0)[..., None]).reshape(-1) for batch in batches]
    splits = [np.repeat(batch.splits.reshape(-1), batch.is_read.shape[-1]) for batch in batches]
    split_of_row = np.where(np.concatenate(counted), np.concatenate(splits), -1)
    own = [np.flatnonzero(split_of_row == split) for split in range(num_splits)]
    rows = np.full((num_splits, max(map(len, own))), -1, np.int32)
    for split, of_split in enumerate(own):
        rows[split, : len(of_split)] = of_split
    return rows


def by_split(values_NxD: jax.Array, rows_ZxM: jax.Array) -> jax.Array:
    """Takes every split's states, [Z, M, D]; what stands behind its last does not count."""
    return values_NxD[jnp.maximum(rows_ZxM, 0)]


def spread_of_states(values_GxNxD: jax.Array, rows_ZxM: jax.Array) -> jax.Array:
    """Measures the spread of one checkpoint's states: [G, 1 + Z]."""
    # One stage after another: centred copies of all would be as large as the states themselves.
    return jax.lax.map(lambda x: spread(by_split(x, rows_ZxM), rows_ZxM >= 0), values_GxNxD)


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
