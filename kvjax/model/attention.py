"""Multi-head causal attention of the decoder, which keys a query may attend to, and attention to keys made earlier."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.interventions import NO_TAP, Tap
from kvjax.model.products import token_product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Keys and values of a layer computed earlier, for a run that computes only the positions after them.

    Attributes:
      keys, values: [B, H, T, E].
    """

    keys: jax.Array
    values: jax.Array


def attention_mask(is_token_BxT: jax.Array, positions_BxP: jax.Array | None = None) -> jax.Array:
    """Masks the keys a query may attend to, bool [B, 1, P, T]: not later than itself, and not padding.

    Args:
      is_token_BxT: bool, False for padding.
      positions_BxP: the queried positions; all T if None.
    """
    length = is_token_BxT.shape[1]
    queries = jnp.arange(length)[None] if positions_BxP is None else positions_BxP
    causal = queries[:, :, None] >= jnp.arange(length)[None, None]
    return (causal & is_token_BxT[:, None, :])[:, None]


def window_mask(is_token_BxT: jax.Array, window_BxW: jax.Array, queries_BxP: jax.Array) -> jax.Array:
    """Masks the keys a query may attend to if only a window is computed, bool [B, 1, P, T + W].

    Args:
      is_token_BxT: bool, False for padding.
      window_BxW: the positions computed, ascending; those before the first are attended to through a `Prefix`.
      queries_BxP: the queried positions.
    """
    length = is_token_BxT.shape[1]
    in_prefix = (jnp.arange(length)[None] < window_BxW[:, :1]) & is_token_BxT
    before = jnp.broadcast_to(in_prefix[:, None], (*queries_BxP.shape, length))
    within = queries_BxP[:, :, None] >= window_BxW[:, None, :]
    # A window that would reach beyond the end repeats the last position, which must be attended to once.
    once = window_BxW == window_BxW[:, :1] + jnp.arange(window_BxW.shape[1])[None]
    within &= (once & jnp.take_along_axis(is_token_BxT, window_BxW, axis=1))[:, None]
    return jnp.concatenate([before, within], axis=-1)[:, None]


def dense(features: int, config: DecoderConfig) -> nn.Dense:
    return nn.Dense(features, precision=config.precision, dot_general=token_product)


class Attention(nn.Module):
    """Multi-head causal self-attention, split into what the heads read and what they write."""

    config: DecoderConfig

    def setup(self) -> None:
        square = functools.partial(dense, self.config.d_model, self.config)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = square(), square(), square(), square()

    def _heads(self, projection: nn.Dense, x: jax.Array) -> jax.Array:
        """Projects by head, [B, H, T, E], one input for all heads, [B, T, D], or one each, [B, T, H, D].

        Heads first: batched [T, E] products are 1.4-2.9 times faster on CPU than the head-last layout.
        """
        config = self.config
        if x.ndim == 4:
            own = projection.variables["params"]
            kernel_DxHxE = own["kernel"].reshape(config.d_model, config.n_heads, config.d_head)
            bias_HxE = own["bias"].reshape(config.n_heads, config.d_head)
            return jnp.einsum("bthd,dhe->bhte", x, kernel_DxHxE, precision=config.precision) + bias_HxE[None, :, None]
        return projection(x).reshape(*x.shape[:2], config.n_heads, config.d_head).swapaxes(1, 2)

    def of_heads(self, projection: str, x: jax.Array) -> jax.Array:
        """Computes `q_proj`, `k_proj` or `v_proj` of every head, [B, H, P, E], from the LayerNorm's output."""
        return self._heads(getattr(self, projection), x)

    def head_outputs(
        self,
        inputs: tuple[jax.Array, jax.Array, jax.Array],
        mask_Bx1xPxT: jax.Array,
        tap: Tap,
        prefix: Prefix | None = None,
    ) -> jax.Array:
        """Computes every head's z, [B, P, H, E].

        Args:
          inputs: the inputs of queries, keys and values, after the LayerNorm: [B, P or T, D], or one per head.
          mask_Bx1xPxT: from `attention_mask`, or `window_mask` with a prefix.
          tap: called at every site.
          prefix: keys and values attended to before those of `inputs`.
        """
        query_input, key_input, value_input = inputs
        q_BxHxPxE = self._heads(self.q_proj, query_input)
        k_BxHxTxE = tap("key", self._heads(self.k_proj, key_input))
        v_BxHxTxE = tap("value", self._heads(self.v_proj, value_input))
        return self.attend(q_BxHxPxE, k_BxHxTxE, v_BxHxTxE, mask_Bx1xPxT, tap, prefix)

    def attend(
        self,
        q_BxHxPxE: jax.Array,
        k_BxHxTxE: jax.Array,
        v_BxHxTxE: jax.Array,
        mask_Bx1xPxT: jax.Array,
        tap: Tap = NO_TAP,
        prefix: Prefix | None = None,
    ) -> jax.Array:
        """Computes every head's z, [B, P, H, E], from its queries, keys and values; arguments as `head_outputs`."""
        matmul = functools.partial(jnp.matmul, precision=self.config.precision)
        scores = matmul(q_BxHxPxE, k_BxHxTxE.swapaxes(2, 3))
        if prefix is not None:  # only scores are joined: keys and values would be copied for every intervention
            scores = jnp.concatenate([matmul(q_BxHxPxE, prefix.keys.swapaxes(2, 3)), scores], axis=-1)
        scores *= self.config.d_head**-0.5
        pattern_BxHxPxT = jax.nn.softmax(jnp.where(mask_Bx1xPxT, scores, -jnp.inf), axis=-1)
        pattern_BxHxPxT = tap("pattern", pattern_BxHxPxT)
        if prefix is None:
            return matmul(pattern_BxHxPxT, v_BxHxTxE).swapaxes(1, 2)
        before, within = jnp.split(pattern_BxHxPxT, [prefix.keys.shape[2]], axis=-1)
        return (matmul(before, prefix.values) + matmul(within, v_BxHxTxE)).swapaxes(1, 2)

    def head_outputs_of_few(
        self, query_input_BxPxD: jax.Array, context_BxTxD: jax.Array, mask_Bx1xPxT: jax.Array
    ) -> jax.Array:
        """Computes every head's z, [B, P, H, E], for few queries, without making keys or values.

        Scores are (W_K q)·x instead of q·(W_K x), and z is W_V applied to the attended mean of x. These are the same
        sums in another order: H P rows of work per sequence, instead of D per position for keys and values. The keys'
        bias adds the same number to all scores of a query, which the softmax ignores.

        Args:
          query_input_BxPxD, context_BxTxD: the inputs of queries, and of keys and values, after the LayerNorm.
          mask_Bx1xPxT: from `attention_mask`.
        """
        config = self.config
        matmul = functools.partial(jnp.matmul, precision=config.precision)
        batch, queries, width = query_input_BxPxD.shape
        towards_BxHxPxD = self.states_sought(self._heads(self.q_proj, query_input_BxPxD))
        flat = towards_BxHxPxD.reshape(batch, -1, width)
        scores = matmul(flat, context_BxTxD.swapaxes(1, 2)) * config.d_head**-0.5
        scores = scores.reshape(batch, config.n_heads, queries, -1)
        pattern_BxHxPxT = jax.nn.softmax(jnp.where(mask_Bx1xPxT, scores, -jnp.inf), axis=-1)
        mixed = matmul(pattern_BxHxPxT.reshape(batch, -1, pattern_BxHxPxT.shape[-1]), context_BxTxD)
        z_BxPxHxE = self.values_of(mixed.reshape(batch, config.n_heads, queries, width)).swapaxes(1, 2)
        return z_BxPxHxE + self.bias_of_heads("v_proj")[None, None]

    def states_sought(self, q_BxHxPxE: jax.Array) -> jax.Array:
        """Maps each head's queries back to states, W_K q, [B, H, P, D]: a key's score is the product with its state."""
        return self.back_to_states("k_proj", q_BxHxPxE)

    def back_to_states(self, projection: str, x_BxHxPxE: jax.Array) -> jax.Array:
        """Maps back by the transpose of each head's `q_proj`, `k_proj` or `v_proj`, [B, H, P, D]."""
        return self._each_head(x_BxHxPxE, self._kernels(projection).swapaxes(1, 2))

    def values_of(self, states_BxHxPxD: jax.Array) -> jax.Array:
        """Maps each head's own states to its values without their bias, [B, H, P, E]."""
        return self._each_head(states_BxHxPxD, self._kernels("v_proj"))

    def bias_of_heads(self, projection: str) -> jax.Array:
        """Cuts the bias of `q_proj`, `k_proj` or `v_proj` into heads, [H, E]."""
        bias = getattr(self, projection).variables["params"]["bias"]
        return bias.reshape(self.config.n_heads, self.config.d_head)

    def _kernels(self, projection: str) -> jax.Array:
        kernel = getattr(self, projection).variables["params"]["kernel"]
        return kernel.reshape(len(kernel), self.config.n_heads, self.config.d_head).swapaxes(0, 1)  # [H, D, E]

    def _each_head(self, x_BxHxPxN: jax.Array, kernel_HxNxM: jax.Array) -> jax.Array:
        """Multiplies each head's rows by its own matrix, [B, H, P, M]: one product for each head."""
        batch, heads, queries, _ = x_BxHxPxN.shape
        rows = x_BxHxPxN.swapaxes(0, 1).reshape(heads, batch * queries, -1)
        found = jnp.matmul(rows, kernel_HxNxM, precision=self.config.precision)
        return found.reshape(heads, batch, queries, -1).swapaxes(0, 1)

    def write(self, z_BxPxHxE: jax.Array) -> jax.Array:
        """Projects the heads' z into the residual stream, [B, P, D]."""
        return self.out_proj(z_BxPxHxE.reshape(*z_BxPxHxE.shape[:2], self.config.d_model))
