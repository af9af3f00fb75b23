"""Runs a checkpoint on the fit set: component means for mean ablation, and the fit of the linear probes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.execution.states_at_reads import flatten_reads, states_at_reads
from kvjax.measure.declarations.residual import PROBE_TARGETS
from kvjax.measure.probes import NO_LABEL, RidgeProbes, RidgeSystem, fit_probes, ridge_system
from kvjax.model.decoder import DecoderConfig, Params
from kvjax.model.restart import run_clean
from kvjax.model.sites import STAGE_SITES, Trace
from kvjax.task.encoding import EncodedRecords
from kvjax.task.vocabulary import PAD_ID


def component_means(
    params: Params, config: DecoderConfig, batches: EncodedRecords, *, features: bool
) -> tuple[Trace, jax.Array | None]:
    """Averages component outputs over the fit set's non-pad positions, and forms the features of probes.

    Args:
      params, config: one checkpoint.
      batches: the fit set's microbatches.
      features: whether to form the features.

    Returns:
      `head_z` [L, 1, 1, H, E] and `mlp_out` [L, 1, 1, D]; and states at p_e and s_e, [2 S, reads, D], or None.
    """

    def one_batch(batch: EncodedRecords) -> tuple[Trace, jax.Array, jax.Array | None]:
        sites = (*STAGE_SITES, "head_z", "mlp_out") if features else ("head_z", "mlp_out")
        _, clean = run_clean(params, config, batch.tokens, sites)
        real = (batch.tokens != PAD_ID) * batch.weights[:, None]
        sums = {name: _sum_tokens(clean.trace[name], real) for name in ("head_z", "mlp_out")}
        return sums, jnp.sum(real), states_at_reads(clean.trace, batch) if features else None

    sums, counts, states = jax.lax.map(one_batch, batches)
    total = jnp.sum(counts)
    means = {name: jnp.sum(x, axis=0)[:, None, None] / total for name, x in sums.items()}
    return means, None if states is None else flatten_reads(states)


def _sum_tokens(x_LxBxTxN: jax.Array, counted_BxT: jax.Array) -> jax.Array:
    extra = (1,) * (x_LxBxTxN.ndim - 3)
    return jnp.sum(x_LxBxTxN * counted_BxT.reshape(1, *counted_BxT.shape, *extra), axis=(1, 2))


def probe_labels(batches: EncodedRecords, *, key_ids: jax.Array, value_ids: jax.Array) -> dict[str, jax.Array]:
    """Finds each read's class for every one of `PROBE_TARGETS`, `NO_LABEL` if it has none: [M B Q] each."""
    counted = batches.is_read & (batches.weights > 0)[..., None]
    tokens = {
        "query_key": (batches.keys, key_ids),
        "value": (batches.answers, value_ids),
        "stale_value": (batches.stale_values, value_ids),
    }
    labels = {}
    for target, (token, ids) in tokens.items():
        matches = token.reshape(-1)[:, None] == ids[None]
        found = matches.any(axis=1) & counted.reshape(-1)
        labels[target] = jnp.where(found, jnp.argmax(matches, axis=1), NO_LABEL)
    return labels


def fit_all_probes(
    features_GxNxD: jax.Array,
    batches: EncodedRecords,
    permutations_JxN: jax.Array,
    *,
    key_ids: jax.Array,
    value_ids: jax.Array,
) -> tuple[RidgeSystem, dict[str, RidgeProbes]]:
    """Fits ridge probes of every target at every stage and position.

    Args:
      features_GxNxD: from `component_means`.
      batches: the fit set's microbatches.
      permutations_JxN: orders of the rows that labels are taken in; the first is the identity, the others make nulls.
      key_ids, value_ids: token ids of the classes.

    Returns:
      The normal equations, and the fitted probes by target.
    """
    labels = probe_labels(batches, key_ids=key_ids, value_ids=value_ids)
    system = ridge_system(features_GxNxD, (labels["query_key"] != NO_LABEL).astype(jnp.float32))
    classes = {"query_key": len(key_ids), "value": len(value_ids), "stale_value": len(value_ids)}
    return system, {
        target: fit_probes(system, labels[target][permutations_JxN], classes[target]) for target in PROBE_TARGETS
    }
