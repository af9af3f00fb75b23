"""Runs a checkpoint on the fit set: component means for ablations, and the fit of the linear probes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.errors import InputError
from kvjax.execution.states_at_reads import flatten_reads, states_at_reads
from kvjax.measure.declarations.residual import PROBE_TARGETS
from kvjax.measure.probes import NO_LABEL, RidgeProbes, RidgeSystem, fit_probes, ridge_system
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params
from kvjax.model.restart import run_clean
from kvjax.model.sites import STAGE_SITES, Trace
from kvjax.task.encoding import NO_ROLE, TOKEN_ROLES, EncodedRecords
from kvjax.task.vocabulary import PAD_ID

COMPONENT_SITES = ("head_z", "mlp_out")

# Roles that outputs are averaged and resampled by: `TOKEN_ROLES`, then the first token's, which is no target. It comes
# last, so that `NO_ROLE` (-1) names it as an index.
NUM_ROLES = len(TOKEN_ROLES) + 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ComponentMeans:
    """One checkpoint's mean component outputs over the fit set's tokens; padding does not count.

    Attributes:
      overall: over all tokens, `head_z` [L, 1, 1, H, E] and `mlp_out` [L, 1, 1, D].
      by_role: over the tokens of each role, `head_z` [L, roles, H, E] and `mlp_out` [L, roles, D]. Roles are in the
        order of `TOKEN_ROLES`, the first token's last. NaN for a role that no token has, see `check_roles`.
    """

    overall: Trace
    by_role: Trace


def component_means(
    params: Params, config: DecoderConfig, batches: EncodedRecords, *, features: bool
) -> tuple[ComponentMeans, jax.Array | None]:
    """Averages component outputs over the fit set's tokens, and forms the features of probes.

    Args:
      params, config: one checkpoint.
      batches: the fit set's microbatches.
      features: whether to form the features.

    Returns:
      The means; and states at p_e and s_e, [2 S, reads, D], or None.
    """

    def one_batch(batch: EncodedRecords) -> tuple[Trace, jax.Array, Trace, jax.Array, jax.Array | None]:
        sites = (*STAGE_SITES, *COMPONENT_SITES) if features else COMPONENT_SITES
        _, clean = run_clean(params, config, batch.tokens, sites)
        real = (batch.tokens != PAD_ID) * batch.weights[:, None]
        sums = {name: _sum_tokens(clean.trace[name], real) for name in COMPONENT_SITES}
        of_role = jax.nn.one_hot(batch.token_roles % NUM_ROLES, NUM_ROLES) * real[..., None]
        by_role = {name: _sum_by_role(clean.trace[name], of_role) for name in COMPONENT_SITES}
        states = states_at_reads(clean.trace, batch) if features else None
        return sums, jnp.sum(real), by_role, jnp.sum(of_role, axis=(0, 1)), states

    sums, counts, by_role, role_counts, states = jax.lax.map(one_batch, batches)
    total = jnp.sum(counts)
    role_totals = jnp.sum(role_counts, axis=0)
    means = ComponentMeans(
        overall={name: jnp.sum(x, axis=0)[:, None, None] / total for name, x in sums.items()},
        by_role={
            name: jnp.sum(x, axis=0) / role_totals.reshape(1, -1, *(1,) * (x.ndim - 3)) for name, x in by_role.items()
        },
    )
    return means, None if states is None else flatten_reads(states)


def _sum_tokens(x_LxBxTxN: jax.Array, counted_BxT: jax.Array) -> jax.Array:
    extra = (1,) * (x_LxBxTxN.ndim - 3)
    return jnp.sum(x_LxBxTxN * counted_BxT.reshape(1, *counted_BxT.shape, *extra), axis=(1, 2))


def _sum_by_role(x_LxBxTxN: jax.Array, of_role_BxTxroles: jax.Array) -> jax.Array:
    """Sums over the tokens of each role, [L, roles, …]."""
    return jnp.tensordot(of_role_BxTxroles, x_LxBxTxN, axes=((0, 1), (1, 2)), precision="highest").swapaxes(0, 1)


def check_roles(fit: EncodedRecords, records: EncodedRecords) -> None:
    """Checks that the fit set has tokens of every role that the records have, so that each has a role mean.

    A sound fit set does: the records are streams of one task, and each has a write, a read and an end.

    Raises:
      InputError: a role is missing.
    """
    held, needed = (set(np.unique(x.token_roles[x.tokens != PAD_ID]).tolist()) for x in (fit, records))
    if missing := sorted(needed - held):
        names = ", ".join("the first token" if role == NO_ROLE else TOKEN_ROLES[role] for role in missing)
        raise InputError(f"role-mean ablation: expected tokens of every role in the fit set; found none of {names}")


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
