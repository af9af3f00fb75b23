"""Adds the effect of a change of one head's z, without projecting the unchanged heads again.

A head writes through W_O into the residual stream and from there, apart from the LayerNorm's scale, linearly into the
MLP's activations. Both maps of one head make one matrix, [E, D + F]. A change of its z costs E × (D + F) products per
position; projecting all heads and the whole state again costs D × (D + F).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.model.decoder import LAYER_NORM_EPS
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params
from kvjax.model.weights import head_output_kernels


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadWrites:
    """The maps of one checkpoint's heads, from z to the residual stream and the MLP's activations.

    Attributes:
      kernels: [L, H, E, D + F]: into the residual stream, and into the MLP's activations before GELU, times the
        standard deviation that the LayerNorm divides by.
      offsets: [L, F], the activations before GELU of a state whose entries are all equal.
    """

    kernels: jax.Array
    offsets: jax.Array

    @classmethod
    def of(cls, params: Params, config: DecoderConfig) -> HeadWrites:
        """Computes the maps of a checkpoint's heads."""
        blocks = params["blocks"]
        written = head_output_kernels(params, config.n_heads)
        norm, into_mlp = blocks["ln_2"], blocks["mlp"]["fc_in"]
        # The LayerNorm subtracts the mean over D, from a sum of states as from each of them.
        centred = written - jnp.mean(written, axis=-1, keepdims=True)
        scaled = norm["scale"][:, None, :, None] * into_mlp["kernel"][:, None]
        offsets = jnp.matmul(norm["bias"][:, None], into_mlp["kernel"], precision="highest")[:, 0] + into_mlp["bias"]
        return cls(jnp.concatenate([written, jnp.matmul(centred, scaled, precision="highest")], axis=-1), offsets)

    def change(
        self,
        layer: jax.Array | int,
        head: jax.Array | int,
        change_BxPxE: jax.Array,
        post_attn_BxPxD: jax.Array,
        mlp_pre_BxPxF: jax.Array,
        *,
        precision: str,
    ) -> tuple[jax.Array, jax.Array]:
        """Computes `post_attn` and `mlp_pre` after a change of one head's z.

        Float32 keeps its digits while the head does not dwarf the rest of the residual stream. On the reference run,
        errors of logits against float64 are 0 to 3 % larger than after projecting again (docs/performance.md). If the
        head makes the stream N times larger, errors of the MLP's activations grow by about a factor N.

        Args:
          layer, head: the head's address, which may be traced.
          change_BxPxE: the new z minus the old; any axes may stand before the last, as in the arrays it is added to.
          post_attn_BxPxD, mlp_pre_BxPxF: before the change.
          precision: of the product.
        """
        added = jnp.matmul(change_BxPxE, self.kernels[layer, head], precision=precision)
        width = post_attn_BxPxD.shape[-1]
        changed = post_attn_BxPxD + added[..., :width]
        offsets = jnp.expand_dims(self.offsets[layer], tuple(range(mlp_pre_BxPxF.ndim - 1)))
        before_scaling = (mlp_pre_BxPxF - offsets) * _deviation(post_attn_BxPxD)
        return changed, (before_scaling + added[..., width:]) / _deviation(changed) + offsets


def _deviation(resid: jax.Array) -> jax.Array:
    """Computes the standard deviation that the LayerNorm divides by, [..., 1]."""
    return jnp.sqrt(jnp.var(resid, axis=-1, keepdims=True) + LAYER_NORM_EPS)
