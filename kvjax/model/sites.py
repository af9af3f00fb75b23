"""Names the activations (sites) of the decoder, and the axis letters.

Axis letters, used in names and comments everywhere:

  R runs or seeds  C checkpoints  K interventions  B sequences   T positions    Q reads of a sequence
  P the positions that are queried: all T, or the Q prediction positions
  L layers         H heads        E head width     D model width  F MLP width   S residual stages   V vocabulary

And outside the model:

  N records, reads or fit rows      J bootstrap resamples, or permutations of labels      X statistics
  Y classes of a probe    Z splits    M metrics    U updates of a training segment
  G gaps between checkpoints, or stages × positions of states at reads
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Site:
    """A named activation.

    Attributes:
      name: as in a trace or an intervention.
      axes: its axis letters; a leading L means one activation per layer, stacked.
      positions: the index, after the layer axis, of the axis that runs over positions. Its letter is P for queried
        positions, T for those that keys and values come from.
    """

    name: str
    axes: str
    positions: int = 1

    @property
    def per_layer(self) -> bool:
        return self.axes.startswith("L")

    @property
    def queried(self) -> bool:
        """Checks whether the activation exists at queried positions alone."""
        return self.axes[self.positions + self.per_layer] == "P"


# In the order a forward pass reaches them: outside the layers first and last, inside a layer in between.
SITES: Mapping[str, Site] = {
    site.name: site
    for site in (
        Site("embedding", "BPD"),
        # The inputs of each head's queries, keys and values: the residual stream before the layer, once per head.
        # They exist only if an edit or a capture names them.
        Site("query_input", "LBPHD"),
        Site("key_input", "LBTHD"),
        Site("value_input", "LBTHD"),
        Site("key", "LBHTE", positions=2),
        Site("value", "LBHTE", positions=2),
        Site("pattern", "LBHPT", positions=2),
        Site("head_z", "LBPHE"),
        Site("attn_out", "LBPD"),
        Site("post_attn", "LBPD"),
        Site("mlp_input", "LBPD"),
        Site("mlp_pre", "LBPF"),  # before GELU
        Site("mlp_hidden", "LBPF"),
        Site("mlp_out", "LBPD"),
        Site("post_mlp", "LBPD"),
        Site("logits_input", "BPD"),
        Site("final_norm", "BPD"),
    )
}
SITE_ORDER = {name: index for index, name in enumerate(SITES)}

STAGE_SITES = ("embedding", "post_attn", "post_mlp", "final_norm")

# Site name -> activation; per-layer sites are stacked on a leading layer axis.
Trace = dict[str, jax.Array]


def stage_names(n_layers: int) -> tuple[str, ...]:
    """Lists the 2L + 2 residual stages in order (docs/definitions.md, "Stages and components")."""
    halves = (f"layer_{layer}_{half}" for layer in range(n_layers) for half in ("post_attn", "post_mlp"))
    return ("embedding", *halves, "final_norm")


def residual_stages(trace: Trace) -> jax.Array:
    """Stacks the residual stages of a trace that holds `STAGE_SITES`: [S, B, P, D]."""
    halves = jnp.stack([trace["post_attn"], trace["post_mlp"]], axis=1)  # [L, 2, B, P, D]
    return jnp.concatenate([trace["embedding"][None], halves.reshape(-1, *halves.shape[2:]), trace["final_norm"][None]])


def take_positions(x: jax.Array, positions_BxQ: jax.Array, axis: int) -> jax.Array:
    """Selects given positions of each sequence.

    Args:
      x: an array with axis 0 = B and positions on `axis`.
      positions_BxQ: int32 positions.
      axis: the position axis of `x`; it has length Q in the result.
    """
    index = positions_BxQ.reshape(
        positions_BxQ.shape[0], *(positions_BxQ.shape[1] if i == axis else 1 for i in range(1, x.ndim))
    )
    return jnp.take_along_axis(x, index, axis=axis)
