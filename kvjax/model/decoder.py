"""The decoder-only transformer of the checkpoints, with layer-stacked parameters (docs/definitions.md).

Pre-LayerNorm blocks, learned positions, biases on every linear but the unembedding, LayerNorm eps 1e-5, exact GELU.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from kvjax.model.attention import Attention, Prefix, attention_mask, dense
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.interventions import CLEAN, NO_TAP, Interventions, Tap
from kvjax.model.sites import Trace, take_positions

LAYER_NORM_EPS = 1e-5


def gelu(x: jax.Array) -> jax.Array:
    """Computes the exact GELU; on a CPU this form is faster than `jax.nn.gelu` and as exact."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * 2**-0.5))


class Mlp(nn.Module):
    """The two-layer MLP with its hidden activations exposed."""

    config: DecoderConfig

    def setup(self) -> None:
        self.fc_in = dense(self.config.d_ff, self.config)
        self.fc_out = dense(self.config.d_model, self.config)

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
