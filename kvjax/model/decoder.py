"""The decoder-only transformer of the checkpoints, with layer-stacked parameters (docs/definitions.md).

Pre-LayerNorm blocks, learned positions, biases on every linear but the unembedding, LayerNorm eps 1e-5, exact GELU.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from kvjax.config.run import ModelConfig
from kvjax.model.interventions import CLEAN, Interventions, Tap
from kvjax.model.products import token_product
from kvjax.model.sites import Trace, take_positions

Params = dict[str, Any]

LAYER_NORM_EPS = 1e-5

NO_TAP = Tap()


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The static shape of a decoder; hashable, so that it keys compiled programs.

    Attributes:
      tied: the unembedding is the token embedding, and the parameters hold no other.
      precision: of every matrix product, `highest` or `default` (with which JAX may use TF32 on a GPU).
      pad_id: the token that no query attends to.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    max_seq_len: int
    tied: bool = True
    precision: str = "highest"
    pad_id: int = 0

    @classmethod
    def from_model_config(cls, model: ModelConfig, vocab_size: int, **static: Any) -> DecoderConfig:
        """Takes the shape from a run's recorded model section."""
        shape = {field: getattr(model, field) for field in ("d_model", "n_layers", "n_heads", "d_ff", "max_seq_len")}
        return cls(vocab_size=vocab_size, **shape, **static)

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads


def gelu(x: jax.Array) -> jax.Array:
    """Computes the exact GELU; on a CPU this form is faster than `jax.nn.gelu` and as exact."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * 2**-0.5))


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


def _dense(features: int, config: DecoderConfig) -> nn.Dense:
    return nn.Dense(features, precision=config.precision, dot_general=token_product)


class Attention(nn.Module):
    """Multi-head causal self-attention, split into what the heads read and what they write."""

    config: DecoderConfig

    def setup(self) -> None:
        dense = functools.partial(_dense, self.config.d_model, self.config)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = dense(), dense(), dense(), dense()

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


class Mlp(nn.Module):
    """The two-layer MLP with its hidden activations exposed."""

    config: DecoderConfig

    def setup(self) -> None:
        self.fc_in = _dense(self.config.d_ff, self.config)
        self.fc_out = _dense(self.config.d_model, self.config)

    def __call__(self, x_BxPxD: jax.Array, tap: Tap) -> jax.Array:
        return self.write(gelu(tap("mlp_pre", self.fc_in(x_BxPxD))), tap)

    def write(self, hidden_BxPxF: jax.Array, tap: Tap) -> jax.Array:
        """Projects the hidden activations into the residual stream, [B, P, D]."""
        return self.fc_out(tap("mlp_hidden", hidden_BxPxF))


def _layer_norm() -> nn.LayerNorm:
    # Flax's one-pass variance is off by 6e-4 if the mean is large against the spread.
    return nn.LayerNorm(epsilon=LAYER_NORM_EPS, use_fast_variance=False)


def _at_queries(x_BxTx: jax.Array, queries_BxP: jax.Array | None) -> jax.Array:
    return x_BxTx if queries_BxP is None else take_positions(x_BxTx, queries_BxP, 1)


class Block(nn.Module):
    """One layer. Its two halves are methods of their own so that a run can restart between them."""

    config: DecoderConfig

    def setup(self) -> None:
        self.ln_1, self.ln_2 = _layer_norm(), _layer_norm()
        self.attn = Attention(self.config)
        self.mlp = Mlp(self.config)

    def __call__(
        self,
        resid_BxTxD: jax.Array,
        mask_Bx1xPxT: jax.Array,
        tap: Tap = NO_TAP,
        *,
        queries_BxP: jax.Array | None = None,
        prefix: Prefix | None = None,
    ) -> jax.Array:
        """Computes the residual stream after the block, [B, P, D].

        Args:
          resid_BxTxD: the residual stream before it, at all positions, or at those after `prefix`.
          mask_Bx1xPxT: from `attention_mask` for the same queries, or from `window_mask`.
          tap: called at every site.
          queries_BxP: the rows of `resid_BxTxD` to compute; keys and values always come from all of them.
          prefix: keys and values of the positions before.
        """
        z_BxPxHxE = self.head_z(resid_BxTxD, mask_Bx1xPxT, tap, queries_BxP=queries_BxP, prefix=prefix)
        return self.from_head_z(_at_queries(resid_BxTxD, queries_BxP), z_BxPxHxE, tap)

    def head_z(
        self,
        resid_BxTxD: jax.Array,
        mask_Bx1xPxT: jax.Array,
        tap: Tap = NO_TAP,
        *,
        queries_BxP: jax.Array | None = None,
        prefix: Prefix | None = None,
    ) -> jax.Array:
        """Computes every head's z, [B, P, H, E], before any edit of it; arguments as for the whole block."""
        normed_BxTxD = self.ln_1(resid_BxTxD)
        if queries_BxP is not None and prefix is None and self._few(queries_BxP.shape[1], tap):
            queried_BxPxD = _at_queries(normed_BxTxD, queries_BxP)
            return self.attn.head_outputs_of_few(queried_BxPxD, normed_BxTxD, mask_Bx1xPxT)

        def attention_input(name: str, at: jax.Array | None = None) -> jax.Array:
            if not tap.wants(name):
                return _at_queries(normed_BxTxD, at)
            shape = (*resid_BxTxD.shape[:2], self.config.n_heads, self.config.d_model)
            return self.ln_1(tap(name, _at_queries(jnp.broadcast_to(resid_BxTxD[:, :, None], shape), at)))

        inputs = (
            attention_input("query_input", queries_BxP),
            attention_input("key_input"),
            attention_input("value_input"),
        )
        return self.attn.head_outputs(inputs, mask_Bx1xPxT, tap, prefix)

    def read(self, resid_BxPxD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Computes every head's queries, keys and values from the residual stream before the block, [B, H, P, E]."""
        normed_BxPxD = self.ln_1(resid_BxPxD)
        return tuple(self.attn.of_heads(name, normed_BxPxD) for name in ("q_proj", "k_proj", "v_proj"))

    def _few(self, queries: int, tap: Tap) -> bool:
        """Checks whether attention is cheaper without keys and values, and no edit or capture needs these."""
        inside = ("query_input", "key_input", "value_input", "key", "value", "pattern")
        return queries * self.config.n_heads < self.config.d_model and not any(map(tap.wants, inside))

    def post_attn(self, resid_BxPxD: jax.Array, z_BxPxHxE: jax.Array) -> jax.Array:
        """Computes the residual stream between the block's halves from the one before it and every head's z."""
        return resid_BxPxD + self.attn.write(z_BxPxHxE)

    def from_head_z(self, resid_BxPxD: jax.Array, z_BxPxHxE: jax.Array, tap: Tap = NO_TAP) -> jax.Array:
        """Computes the residual stream after the block from the one before it and every head's z."""
        attn_out_BxPxD = tap("attn_out", self.attn.write(tap("head_z", z_BxPxHxE)))
        return self.from_post_attn(resid_BxPxD + attn_out_BxPxD, tap)

    def from_post_attn(self, resid_BxPxD: jax.Array, tap: Tap = NO_TAP) -> jax.Array:
        """Computes the residual stream after the block from the one between its halves."""
        resid_BxPxD = tap("post_attn", resid_BxPxD)
        mlp_out_BxPxD = self.mlp(self.ln_2(tap("mlp_input", resid_BxPxD)), tap)
        return self.from_mlp_out(resid_BxPxD, mlp_out_BxPxD, tap)

    def from_mlp_hidden(self, resid_BxPxD: jax.Array, hidden_BxPxF: jax.Array, tap: Tap = NO_TAP) -> jax.Array:
        """Computes the residual stream after the block from the one between its halves and the MLP's activations."""
        return self.from_mlp_out(resid_BxPxD, self.mlp.write(hidden_BxPxF, tap), tap)

    def from_mlp_out(self, resid_BxPxD: jax.Array, mlp_out_BxPxD: jax.Array, tap: Tap = NO_TAP) -> jax.Array:
        """Computes the residual stream after the block from the one between its halves and the MLP's output."""
        return tap("post_mlp", resid_BxPxD + tap("mlp_out", mlp_out_BxPxD))


class Decoder(nn.Module):
    """The whole model. Parameters: `token_embedding`, `position_embedding`, `blocks` (stacked on L), `final_norm`,
    and `unembedding` if it is not tied.

    Attributes:
      config: its shape.
      unroll: how many layers stand one after another in the compiled program; a loop runs over such groups. Gradients
        are faster without a loop, which stores and copies what their backward pass needs.
    """

    config: DecoderConfig
    unroll: int = 1

    def setup(self) -> None:
        config = self.config
        self.token_embedding = nn.Embed(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embed(config.max_seq_len, config.d_model)
        self.blocks = Block(config)
        self.final_norm = _layer_norm()
        if not config.tied:
            self.unembedding = nn.Dense(config.vocab_size, use_bias=False, precision=config.precision)

    def __call__(
        self, tokens_BxT: jax.Array, edits: Interventions = CLEAN, capture: tuple[str, ...] = ()
    ) -> tuple[jax.Array, Trace]:
        """Runs the model: logits at every position, [B, T, V], and the captured activations.

        Args:
          tokens_BxT: token ids.
          edits: the interventions.
          capture: names of the sites to return, after any edit of them.
        """
        tap = Tap(edits, capture=capture)
        mask = attention_mask(tokens_BxT != self.config.pad_id)
        resid_BxTxD = tap("embedding", self.embed(tokens_BxT))

        def layer_body(block: Block, resid_BxTxD: jax.Array, layer: jax.Array) -> tuple[jax.Array, Trace]:
            layer_tap = Tap(edits, layer, capture=capture)
            return block(resid_BxTxD, mask, layer_tap), layer_tap.record

        scan = nn.scan(layer_body, variable_axes={"params": 0}, split_rngs={"params": True}, unroll=self.unroll)
        resid_BxTxD, seen = scan(self.blocks, resid_BxTxD, jnp.arange(self.config.n_layers))
        logits = self.read_out(resid_BxTxD, tap)
        return logits, tap.record | seen

    def embed(self, tokens_BxT: jax.Array) -> jax.Array:
        """Adds token and position embeddings, [B, T, D]."""
        return self.token_embedding(tokens_BxT) + self.position_embedding(jnp.arange(tokens_BxT.shape[1]))[None]

    def unembed(self, normed: jax.Array) -> jax.Array:
        """Computes the logits of states after the final LayerNorm, [..., V]."""
        if self.config.tied:
            return jnp.matmul(normed, self.token_embedding.embedding.T, precision=self.config.precision)
        return self.unembedding(normed)

    def read_out(self, resid: jax.Array, tap: Tap = NO_TAP) -> jax.Array:
        """Computes the logits of residual states before the final LayerNorm, [..., V]."""
        return self.unembed(tap("final_norm", self.final_norm(tap("logits_input", resid))))


def layer_params(params: Params, layer: jax.Array | int) -> Params:
    """Slices the parameters of one block from the stacked ones; `layer` may be traced."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False), params["blocks"])


def stack_params(params: Sequence[Params]) -> Params:
    """Stacks the parameters of several checkpoints of one shape on a leading axis C.

    If only some are tied (an untied unembedding may start as a copy of the token embedding), all get one of their own,
    so that their trees have one structure.
    """
    if any("unembedding" in tree for tree in params):
        params = [untie(tree) for tree in params]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *params)


def untie(params: Params) -> Params:
    """Gives tied parameters an unembedding of their own, equal to the token embedding."""
    if "unembedding" in params:
        return params
    return {**params, "unembedding": {"kernel": np.asarray(params["token_embedding"]["embedding"]).T}}
