"""Measures how much MLPs write (docs/definitions.md, "Heads and MLPs")."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def write_norm_sums(mlp_out_LxBxQxD: jax.Array, is_read_BxQ: jax.Array) -> jax.Array:
    """Sums the L2 norm of each MLP's output over the reads of a sequence: [L, B].

    Args:
      mlp_out_LxBxQxD: the MLP outputs at one position of each read.
      is_read_BxQ: which reads exist.
    """
    return jnp.sum(jnp.where(is_read_BxQ[None], jnp.linalg.norm(mlp_out_LxBxQxD, axis=-1), 0.0), axis=-1)
