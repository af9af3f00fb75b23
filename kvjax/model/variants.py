"""Continues many variants of one run at once, inside a window, from where each begins to differ.

A variant is the base run with other residual states at some positions before some layer. Nothing before its first
changed position differs from the base run, so that only the positions from there on are computed. The rows of all
variants, one for each of their positions, go through every linear map together; attention alone looks at variants.

What variants share is computed once:

- Attention before the window is a partial softmax (its largest score, sum of weights and mixed values) that is joined
  with the window's. It depends on the query alone.
- In the layer where variants begin to differ, every position has one of two states, the base run's or the changed one.
  So do its query, key and value: all scores of all variants are among those of the two by the two.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax.model.decoder import Block, Decoder
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params, layer_params
from kvjax.model.restart import CleanRun
from kvjax.model.sites import take_positions
from kvjax.model.variant_rows import Rows

# Stands for the score of a key that is masked. It is finite, so that a query without keys gives zeros and not NaN.
_MASKED = -1e30


class _Partial(NamedTuple):
    """A softmax over some keys, to be joined with others: largest score, sum of weights, mixed values [..., E]."""

    largest: jax.Array
    total: jax.Array
    mixed: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WindowRun:
    """The base run of variants.

    Attributes:
      keys, values: [L, B, H, T, E].
      own_keys, own_values: of the window, [L, B, H, W, E].
      before_LxBxWxD: the residual stream before each layer, in the window.
      in_prefix_BxT: bool, the tokens before the window.
      sees_BxWxW: bool, which positions of the window each one attends to.
      reads_BxQ: the positions read, counted from the start of the window.
    """

    keys: jax.Array
    values: jax.Array
    own_keys: jax.Array
    own_values: jax.Array
    before_LxBxWxD: jax.Array
    in_prefix_BxT: jax.Array
    sees_BxWxW: jax.Array
    reads_BxQ: jax.Array

    @classmethod
    def of(cls, run: CleanRun, config: DecoderConfig, window_BxW: jax.Array, positions_BxQ: jax.Array) -> WindowRun:
        """Cuts a run to a window.

        Args:
          run: with `RESTART_CAPTURE` and `WINDOW_CAPTURE`.
          config: the model's shape.
          window_BxW: consecutive positions; the last one is repeated if the stream ends before.
          positions_BxQ: the positions read. Those outside the window get meaningless logits.
        """
        is_token_BxT, width = run.tokens != config.pad_id, window_BxW.shape[1]
        keys, values = run.at("key"), run.at("value")
        own_keys, own_values = (in_window(x, window_BxW, axis=2) for x in (keys, values))
        before = jnp.concatenate([run.trace["embedding"][None], run.trace["post_mlp"][:-1]])
        # A position that is repeated at the end must be attended to once.
        once = window_BxW == window_BxW[:, :1] + jnp.arange(width)[None]
        is_key_BxW = once & jnp.take_along_axis(is_token_BxT, window_BxW, axis=1)
        return cls(
            keys,
            values,
            own_keys,
            own_values,
            in_window(before, window_BxW),
            (jnp.arange(is_token_BxT.shape[1])[None] < window_BxW[:, :1]) & is_token_BxT,
            jnp.tril(jnp.ones((width, width), bool))[None] & is_key_BxW[:, None],
            jnp.clip(positions_BxQ - window_BxW[:, :1], 0, width - 1),
        )


def in_window(x_LxBxT: jax.Array, window_BxW: jax.Array, *, axis: int = 1) -> jax.Array:
    """Takes the positions of a window from an activation of every layer, [L, B, …]; `axis` counts after the layers."""
    return jax.vmap(lambda of_layer: take_positions(of_layer, window_BxW, axis))(x_LxBxT)


def rows_after(
    params: Params,
    config: DecoderConfig,
    base: WindowRun,
    changed_BxWxD: jax.Array,
    where_BxKxW: jax.Array,
    rows: Rows,
    layer: jax.Array | int,
) -> jax.Array:
    """Runs the layer before which variants begin to differ: the residual stream after it, [B, N, D].

    Args:
      params, config: one checkpoint.
      base: the run that variants differ from.
      changed_BxWxD: the residual stream before the layer where it is changed, the same in all variants.
      where_BxKxW: bool, where each variant is changed; nowhere before its first row.
      rows: the positions computed.
      layer: which; may be traced.
    """
    block, before_BxWxD = _block(params, config, layer), base.before_LxBxWxD[layer]
    z_BxKxWxHxE = _first_attention(config, base, block, before_BxWxD, changed_BxWxD, where_BxKxW, layer)
    changed = rows.of_grid(where_BxKxW)[..., None]
    resid_BxNxD = jnp.where(changed, rows.of_window(changed_BxWxD), rows.of_window(before_BxWxD))
    return block.from_head_z(resid_BxNxD, rows.of_grid(z_BxKxWxHxE))


def reads_after_last(
    params: Params, config: DecoderConfig, base: WindowRun, changed_BxWxD: jax.Array, where_BxKxW: jax.Array
) -> jax.Array:
    """Runs the last layer if variants begin to differ before it: the logits at the positions read, [B, K, Q, V]."""
    layer = config.n_layers - 1
    block, before_BxWxD = _block(params, config, layer), base.before_LxBxWxD[layer]
    z = _first_attention(config, base, block, before_BxWxD, changed_BxWxD, where_BxKxW, layer, base.reads_BxQ)
    clean, changed = (take_positions(x, base.reads_BxQ, 1)[:, None] for x in (before_BxWxD, changed_BxWxD))
    resid = jnp.where(take_positions(where_BxKxW, base.reads_BxQ, 2)[..., None], changed, clean)
    resid, z = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (resid, z))
    return _logits(params, config, block.from_head_z(resid, z), where_BxKxW.shape[1])


def run_on(
    params: Params, config: DecoderConfig, base: WindowRun, rows_BxNxD: jax.Array, rows: Rows, layer: jax.Array | int
) -> jax.Array:
    """Runs variants on from their rows before a layer: the logits at the positions read, [B, K, Q, V].

    Args:
      params, config: one checkpoint.
      base: the run that variants differ from.
      rows_BxNxD: the residual stream before the layer.
      rows: the positions computed.
      layer: which; may be traced.
    """
    rows_BxNxD = jax.lax.fori_loop(
        layer,
        config.n_layers - 1,
        lambda layer, rows_BxNxD: _next_layer(params, config, base, rows_BxNxD, rows, layer),
        rows_BxNxD,
    )
    return _read_last_layer(params, config, base, rows_BxNxD, rows)


def heads_with_changed_input(
    config: DecoderConfig,
    block: Block,
    base: WindowRun,
    change_BxWxD: jax.Array,
    layer: jax.Array | int,
    queries_BxP: jax.Array | None = None,
) -> jax.Array:
    """Computes every head's z with a change of its query input alone, its key input, and its value input.

    Args:
      config: the model's shape.
      block: the layer, with its parameters.
      base: the run that is changed.
      change_BxWxD: what is added to the residual stream before the layer, in the window.
      layer: which; may be traced.
      queries_BxP: the positions of the window whose z is computed; all if None.

    Returns:
      [B, 3, P, H, E]: with other queries, keys, values.
    """
    before_BxWxD, sees_BxPxW = base.before_LxBxWxD[layer], base.sees_BxWxW
    changed_BxWxD = before_BxWxD + change_BxWxD
    k, v = base.own_keys[layer], base.own_values[layer]
    _, k_changed, v_changed = block.read(changed_BxWxD)
    asking = [before_BxWxD, changed_BxWxD]
    if queries_BxP is not None:
        asking = [take_positions(x, queries_BxP, 1) for x in asking]
        sees_BxPxW = take_positions(sees_BxPxW, queries_BxP, 1)
    q_both = block.read(jnp.concatenate(asking, axis=1))[0]
    halves = [jnp.split(x, 2, axis=2) for x in _before_window(config, base, q_both, layer)]
    before, before_changed = (_Partial(*(x[i] for x in halves)) for i in range(2))
    q, q_changed = jnp.split(q_both, 2, axis=2)

    def attend(q: jax.Array, before: _Partial, k: jax.Array, v: jax.Array) -> jax.Array:
        weights, total, largest = _weights(_scores(config, q, k), sees_BxPxW[:, None], before.largest)
        return _mixed(before, largest, total, _product(config, weights, v)).swapaxes(1, 2)

    each = [attend(q_changed, before_changed, k, v), attend(q, before, k_changed, v), attend(q, before, k, v_changed)]
    return jnp.stack(each, axis=1)


def _first_attention(
    config: DecoderConfig,
    base: WindowRun,
    block: Block,
    before_BxWxD: jax.Array,
    changed_BxWxD: jax.Array,
    where_BxKxW: jax.Array,
    layer: jax.Array | int,
    queries_BxP: jax.Array | None = None,
) -> jax.Array:
    """Computes the z of all heads in the layer where variants begin to differ, [B, K, P, H, E]."""
    # The base run's queries, keys and values, then the changed ones.
    q, k, v = block.read(jnp.concatenate([before_BxWxD, changed_BxWxD], axis=1))
    batch, heads, _, width = q.shape
    window, variants = before_BxWxD.shape[1], where_BxKxW.shape[1]
    sees_BxPxW, asks_BxKxP = base.sees_BxWxW, where_BxKxW
    if queries_BxP is not None:
        q = jnp.concatenate([take_positions(x, queries_BxP, 2) for x in jnp.split(q, 2, axis=2)], axis=2)
        sees_BxPxW, asks_BxKxP = take_positions(sees_BxPxW, queries_BxP, 1), take_positions(asks_BxKxP, queries_BxP, 2)
    queries = q.shape[2] // 2
    asks = asks_BxKxP[:, None, :, :, None]

    def at_queries(x: jax.Array) -> jax.Array:
        """Chooses between the two kinds of queries, [B, H, 2 P, X] to [B, H, K, P, X]."""
        of_base, of_changed = jnp.split(x[:, :, None], 2, axis=3)
        return jnp.where(asks, of_changed, of_base)

    is_changed = where_BxKxW[:, None, :, None]
    scores = at_queries(_scores(config, q, k))
    scores = jnp.where(is_changed, scores[..., window:], scores[..., :window])
    before = _Partial(*map(at_queries, _before_window(config, base, q, layer)))
    weights, total, largest = _weights(scores, sees_BxPxW[:, None, None], before.largest)
    by_kind = jnp.concatenate([jnp.where(is_changed, 0.0, weights), jnp.where(is_changed, weights, 0.0)], axis=-1)
    within = _product(config, by_kind.reshape(batch, heads, variants * queries, 2 * window), v)
    z = _mixed(before, largest, total, within.reshape(batch, heads, variants, queries, width))
    return jnp.moveaxis(z, 1, 3)


def _next_layer(
    params: Params, config: DecoderConfig, base: WindowRun, rows_BxNxD: jax.Array, rows: Rows, layer: jax.Array | int
) -> jax.Array:
    """Runs a layer before the last at the rows of all variants, [B, N, D]."""
    block = _block(params, config, layer)
    q, k, v = block.read(rows_BxNxD)
    k, v = rows.grid(k, base.own_keys[layer], axis=2), rows.grid(v, base.own_values[layer], axis=2)
    # Positions before a variant's first row ask as well, for nothing, so that variants have one shape.
    q = rows.grid(q, jnp.zeros_like(base.own_keys[layer]), axis=2)  # [B, H, K, W, E]
    shape = q.shape
    before = _before_window(config, base, q.reshape(*shape[:2], -1, shape[-1]), layer)
    before = _Partial(*(x.reshape(*shape[:-1], -1) for x in before))
    weights, total, largest = _weights(_scores(config, q, k), base.sees_BxWxW[:, None, None], before.largest)
    z = _mixed(before, largest, total, _product(config, weights, v))
    return block.from_head_z(rows_BxNxD, rows.of_grid(jnp.moveaxis(z, 1, 3)))


def _read_last_layer(
    params: Params, config: DecoderConfig, base: WindowRun, rows_BxNxD: jax.Array, rows: Rows
) -> jax.Array:
    """Runs the last layer at the positions read, of variants whose states differ already: [B, K, Q, V].

    Few positions ask, so that no keys and values are made (`Attention.head_outputs_of_few`).
    """
    layer = config.n_layers - 1
    block = _block(params, config, layer)
    before_BxWxD, queries = base.before_LxBxWxD[layer], base.reads_BxQ.shape[1]
    states_BxKxWxD = rows.grid(rows_BxNxD, before_BxWxD)
    normed_BxKxWxD = rows.grid(block.ln_1(rows_BxNxD), block.ln_1(before_BxWxD))
    batch, variants, _, width = states_BxKxWxD.shape
    resid_BxKQxD = take_positions(states_BxKxWxD, base.reads_BxQ, 2).reshape(batch, -1, width)
    asking = take_positions(normed_BxKxWxD, base.reads_BxQ, 2).reshape(batch, -1, width)
    q = block.attn.of_heads("q_proj", asking)  # [B, H, K Q, E]
    sought = block.attn.states_sought(q) * config.d_head**-0.5
    # The keys before the window have their bias, so that those inside need it as well.
    of_bias = jnp.sum(q * block.attn.bias_of_heads("k_proj")[None, :, None], axis=-1) * config.d_head**-0.5

    def by_variant(x: jax.Array) -> jax.Array:  # [B, H, K Q, X] to [B, K, H Q, X]
        x = x.reshape(batch, config.n_heads, variants, queries, -1).swapaxes(1, 2)
        return x.reshape(batch, variants, config.n_heads * queries, -1)

    def by_head(x: jax.Array) -> jax.Array:  # and back
        x = x.reshape(batch, variants, config.n_heads, queries, -1).swapaxes(1, 2)
        return x.reshape(batch, config.n_heads, variants * queries, -1)

    scores = _product(config, by_variant(sought), normed_BxKxWxD.swapaxes(2, 3)) + by_variant(of_bias[..., None])
    sees_BxQxW = take_positions(base.sees_BxWxW, base.reads_BxQ, 1)
    before = _before_window(config, base, q, layer)
    is_key = jnp.tile(sees_BxQxW[:, None], (1, 1, config.n_heads, 1))
    weights, total, largest = _weights(scores, is_key, by_variant(before.largest))
    within = block.attn.values_of(by_head(_product(config, weights, normed_BxKxWxD)))
    total, largest = by_head(total), by_head(largest)
    within += total * block.attn.bias_of_heads("v_proj")[None, :, None]
    z_BxKQxHxE = _mixed(before, largest, total, within).swapaxes(1, 2)
    return _logits(params, config, block.from_head_z(resid_BxKQxD, z_BxKQxHxE), variants)


def _logits(params: Params, config: DecoderConfig, resid_BxKQxD: jax.Array, variants: int) -> jax.Array:
    """Computes the logits of variants at the positions read, [B, K, Q, V], from the residual stream before them."""
    logits = Decoder(config).apply({"params": params}, resid_BxKQxD, method=Decoder.read_out)
    return logits.reshape(len(logits), variants, -1, logits.shape[-1])


def _block(params: Params, config: DecoderConfig, layer: jax.Array | int) -> Block:
    return Block(config).bind({"params": layer_params(params, layer)})


def _product(config: DecoderConfig, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=config.precision)


def _scores(config: DecoderConfig, q: jax.Array, k: jax.Array) -> jax.Array:
    return _product(config, q, k.swapaxes(-1, -2)) * config.d_head**-0.5


def _before_window(config: DecoderConfig, base: WindowRun, q_BxHxPxE: jax.Array, layer: jax.Array | int) -> _Partial:
    """Attends to the positions before the window: [B, H, P, 1] twice, and [B, H, P, E]."""
    is_key = base.in_prefix_BxT[:, None, None]
    scores = jnp.where(is_key, _scores(config, q_BxHxPxE, base.keys[layer]), _MASKED)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(is_key, jnp.exp(scores - largest), 0.0)
    return _Partial(largest, jnp.sum(weights, axis=-1, keepdims=True), _product(config, weights, base.values[layer]))


def _weights(scores: jax.Array, is_key: jax.Array, largest_before: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Forms the weights of the window's keys, their sum, and the largest score of all keys."""
    scores = jnp.where(is_key, scores, _MASKED)
    largest = jnp.maximum(largest_before, jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    return weights, jnp.sum(weights, axis=-1, keepdims=True), largest


def _mixed(before: _Partial, largest: jax.Array, total: jax.Array, within: jax.Array) -> jax.Array:
    """Joins both parts of a softmax."""
    rescaled = jnp.exp(before.largest - largest)
    return (before.mixed * rescaled + within) / (before.total * rescaled + total)
