"""Interventions as functions from arrays to arrays, to be jitted, vmapped and differentiated.

Each runs the plain model. So every place and position is exact, and gradients flow through parameters, activations and
replacements. `kvjax intervene` restarts forward passes instead. Layers, heads and masks may be traced; the forward pass
is compiled once for each shape and site.

All raise `InputError` for a site, layer, head, mask or token that the model does not have, as far as it is known before
the program runs.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kvjax.errors import InputError, bad_argument
from kvjax.intervene.paths import HEAD_INPUTS
from kvjax.intervene.validation import check_path, check_place, checked_mask, checked_pair, checked_tokens
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.interventions import CLEAN, Edit, Interventions
from kvjax.model.params import Params
from kvjax.model.sites import SITES, STAGE_SITES, Trace
from kvjax.model.transforms import plain_forward
from kvjax.model.weights import head_output_kernels


def ablate(
    params: Params,
    config: DecoderConfig,
    tokens_BxT: jax.Array,
    *,
    heads_LxH: jax.Array | None = None,
    mlps_L: jax.Array | None = None,
    head_value: jax.Array | float = 0.0,
    mlp_value: jax.Array | float = 0.0,
) -> jax.Array:
    """Replaces the outputs of a set of heads and MLPs, by zero or by other values, and returns the logits [B, T, V].

    >>> import kvjax, jax, jax.numpy as jnp
    >>> from kvjax.model.decoder import Decoder
    >>> from kvjax.model.decoder_config import DecoderConfig
    >>> config = DecoderConfig(vocab_size=12, d_model=8, n_layers=2, n_heads=2, d_ff=16, max_seq_len=6)
    >>> tokens = jnp.array([[1, 8, 4, 10, 9, 4]])
    >>> params = Decoder(config).init(jax.random.key(0), tokens)["params"]
    >>> second = jnp.array([[False, False], [False, True]])  # head 1 of layer 1
    >>> drop = kvjax.ablate(params, config, tokens, heads_LxH=second) - kvjax.ablate(params, config, tokens)
    >>> drop.shape, bool(jnp.abs(drop).max() > 0)
    ((1, 6, 12), True)

    Args:
      params, config: one checkpoint.
      tokens_BxT: token ids.
      heads_LxH: bool, the heads whose z is replaced before the output projection.
      mlps_L: bool, the MLPs whose whole output is replaced.
      head_value, mlp_value: the replacements: a number, or an array of the axes of `head_z` [L, B, T, H, E] or
        `mlp_out` [L, B, T, D], each of its length or 1, such as means over a data set.
    """
    tokens, edits = checked_tokens(config, tokens_BxT), {}
    if heads_LxH is not None:
        mask = checked_mask(heads_LxH, (config.n_layers, config.n_heads), "heads_LxH")
        edits["head_z"] = Edit(mask[:, None, None, :, None], _of_rank(head_value, "head_z"))
    if mlps_L is not None:
        mask = checked_mask(mlps_L, (config.n_layers,), "mlps_L")
        edits["mlp_out"] = Edit(mask[:, None, None, None], _of_rank(mlp_value, "mlp_out"))
    return _forward(config, (), params, tokens, edits)[0]


def patch(
    params: Params,
    config: DecoderConfig,
    tokens_BxT: jax.Array,
    source_tokens_BxT: jax.Array,
    *,
    site: str,
    layer: jax.Array | int = 0,
    head: jax.Array | int | None = None,
    where_BxT: jax.Array | None = None,
) -> jax.Array:
    """Takes one activation from the run on other tokens, and returns the logits [B, T, V].

    >>> import kvjax, jax, jax.numpy as jnp
    >>> from kvjax.model.decoder import Decoder
    >>> from kvjax.model.decoder_config import DecoderConfig
    >>> config = DecoderConfig(vocab_size=12, d_model=8, n_layers=2, n_heads=2, d_ff=16, max_seq_len=6)
    >>> clean, corrupted = jnp.array([[1, 8, 4, 10, 9, 4]]), jnp.array([[1, 8, 4, 11, 9, 4]])
    >>> params = Decoder(config).init(jax.random.key(0), clean)["params"]
    >>> every_head = jax.vmap(
    ...     lambda head: kvjax.patch(params, config, corrupted, clean, site="head_z", layer=1, head=head)
    ... )(jnp.arange(2))
    >>> every_head.shape
    (2, 1, 6, 12)
    >>> whole = kvjax.patch(params, config, corrupted, clean, site="post_mlp", layer=1)  # the last stage: all of it
    >>> bool(jnp.allclose(whole, kvjax.ablate(params, config, clean), atol=1e-5))
    True

    Args:
      params, config: one checkpoint.
      tokens_BxT: the run that is patched.
      source_tokens_BxT: the run that the activation comes from; of the same shape.
      site: of `kvjax.model.sites.SITES`, such as `embedding`, `post_attn`, `post_mlp`, `head_z`, `mlp_out`.
      layer: of a site that has layers.
      head: of `head_z` or a head's input; all heads if None.
      where_BxT: bool, the positions patched; all if None.
    """
    check_place(config, site, layer, head)
    tokens, source = checked_pair(config, tokens_BxT, source_tokens_BxT)
    value = _forward(config, (site,), params, source)[1][site]
    return _run_with(params, config, tokens, site, layer, head, where_BxT, value)


def path_patch(
    params: Params,
    config: DecoderConfig,
    tokens_BxT: jax.Array,
    source_tokens_BxT: jax.Array,
    *,
    sender: str,
    sender_layer: jax.Array | int = 0,
    sender_head: jax.Array | int = 0,
    receiver: str,
    receiver_layer: jax.Array | int = 0,
    receiver_head: jax.Array | int | None = None,
) -> jax.Array:
    """Changes one receiver's input along the direct path from a sender, and returns the logits [B, T, V].

    The input gets the difference of the sender's output between the two runs; everything before the receiver is as in
    the run on `tokens_BxT`, the receiver and everything after it are computed again.

    >>> import kvjax, jax, jax.numpy as jnp
    >>> from kvjax.model.decoder import Decoder
    >>> from kvjax.model.decoder_config import DecoderConfig
    >>> config = DecoderConfig(vocab_size=12, d_model=8, n_layers=2, n_heads=2, d_ff=16, max_seq_len=6)
    >>> clean, corrupted = jnp.array([[1, 8, 4, 10, 9, 4]]), jnp.array([[1, 8, 4, 11, 9, 4]])
    >>> params = Decoder(config).init(jax.random.key(0), clean)["params"]
    >>> values = {"receiver": "value_input", "receiver_layer": 1, "receiver_head": 0}
    >>> to_values = kvjax.path_patch(params, config, corrupted, clean, sender="mlp_out", **values)
    >>> to_values.shape
    (1, 6, 12)

    Args:
      params, config: one checkpoint.
      tokens_BxT, source_tokens_BxT: the run that is patched, and the one that the sender's output comes from.
      sender: `embedding`, `head_z` (what the head writes through the output projection) or `mlp_out`.
      sender_layer, sender_head: which; the head of `head_z` alone.
      receiver: `query_input`, `key_input`, `value_input`, `mlp_input` or `logits_input`, after the sender.
      receiver_layer, receiver_head: which; all heads if the head is None.

    Raises:
      InputError: sender or receiver is of no such kind, or the receiver does not come after the sender.
    """
    if sender not in ("embedding", "head_z", "mlp_out"):
        raise InputError(f"path_patch: expected a sender among embedding, head_z, mlp_out; found {sender}")
    if not receiver.endswith("_input"):
        raise InputError(f"path_patch: expected a receiver's input, such as query_input; found {receiver}")
    if sender == "head_z" and sender_head is None:
        raise bad_argument("sender_head", "one whole number", sender_head)
    check_place(config, sender, sender_layer, sender_head if sender == "head_z" else None, "sender_")
    check_place(config, receiver, receiver_layer, receiver_head, "receiver_")
    check_path(config, sender, sender_layer, receiver, receiver_layer)
    tokens, source_tokens = checked_pair(config, tokens_BxT, source_tokens_BxT)
    base = _forward(config, (sender, receiver), params, tokens)[1]
    source = _forward(config, (sender,), params, source_tokens)[1]
    change = source[sender] - base[sender]
    if sender != "embedding":
        change = jax.lax.dynamic_index_in_dim(change, jnp.asarray(sender_layer), 0, keepdims=False)
    if sender == "head_z":
        z = jax.lax.dynamic_index_in_dim(change, jnp.asarray(sender_head), 2, keepdims=False)  # [B, T, E]
        kernel = head_output_kernels(params, config.n_heads)
        change = jnp.einsum("bte,ed->btd", z, kernel[sender_layer, sender_head], precision=config.precision)
    if receiver in HEAD_INPUTS:
        change = change[:, :, None]
    if SITES[receiver].per_layer:
        change = change[None]
    return _run_with(params, config, tokens, receiver, receiver_layer, receiver_head, None, base[receiver] + change)


def across_checkpoints(
    params: Params,
    other_params: Params,
    config: DecoderConfig,
    tokens_BxT: jax.Array,
    *,
    site: str,
    layer: jax.Array | int = 0,
    where_BxT: jax.Array | None = None,
) -> jax.Array:
    """Runs one checkpoint on with a stage's states of another on the same tokens, and returns the logits [B, T, V].

    >>> import kvjax, jax, jax.numpy as jnp
    >>> from kvjax.model.decoder import Decoder
    >>> from kvjax.model.decoder_config import DecoderConfig
    >>> config = DecoderConfig(vocab_size=12, d_model=8, n_layers=2, n_heads=2, d_ff=16, max_seq_len=6)
    >>> tokens = jnp.array([[1, 8, 4, 10, 9, 4]])
    >>> early, late = (Decoder(config).init(jax.random.key(seed), tokens)["params"] for seed in (0, 1))
    >>> mixed = kvjax.across_checkpoints(early, late, config, tokens, site="post_mlp", layer=0)
    >>> own = kvjax.across_checkpoints(early, early, config, tokens, site="post_mlp", layer=0)
    >>> bool(jnp.allclose(own, kvjax.ablate(early, config, tokens), atol=1e-5)), bool(jnp.allclose(own, mixed))
    (True, False)

    Args:
      params: of the checkpoint that is run.
      other_params: of the checkpoint whose states are taken; of the same shape.
      config: the shape.
      tokens_BxT: token ids.
      site: `embedding`, `post_attn`, `post_mlp` or `final_norm` (the other's state through this one's unembedding).
      layer: of `post_attn` and `post_mlp`.
      where_BxT: bool, the positions taken; all if None.
    """
    if site not in STAGE_SITES:
        raise InputError(f"across_checkpoints: expected a stage among {', '.join(STAGE_SITES)}; found {site}")
    check_place(config, site, layer, None)
    tokens = checked_tokens(config, tokens_BxT)
    value = _forward(config, (site,), other_params, tokens)[1][site]
    return _run_with(params, config, tokens, site, layer, None, where_BxT, value)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(
    config: DecoderConfig,
    capture: tuple[str, ...],
    params: Params,
    tokens_BxT: jax.Array,
    edits: Interventions = CLEAN,
) -> tuple[jax.Array, Trace]:
    return plain_forward(config)(params, tokens_BxT, edits=edits, capture=capture)


def _run_with(
    params: Params,
    config: DecoderConfig,
    tokens_BxT: jax.Array,
    site: str,
    layer: jax.Array | int,
    head: jax.Array | int | None,
    where_BxT: jax.Array | None,
    value: jax.Array,
) -> jax.Array:
    """Replaces a site's activation in one layer and head, at some positions, and returns the logits."""
    axes = SITES[site].axes
    sizes = {"L": config.n_layers, "H": config.n_heads}
    mask = jnp.ones((1,) * len(axes), bool)
    for letter, chosen in (("L", layer), ("H", head)):
        if letter in axes and chosen is not None:
            along = [sizes[letter] if axis == letter else 1 for axis in axes]
            mask &= (jnp.arange(sizes[letter]) == chosen).reshape(along)
    if where_BxT is not None:
        where = checked_mask(where_BxT, tokens_BxT.shape, "where_BxT")
        lengths = {"B": where.shape[0], "P": where.shape[1], "T": where.shape[1]}
        mask &= where.reshape([lengths.get(axis, 1) for axis in axes])
    return _forward(config, (), params, tokens_BxT, {site: Edit(mask, value)})[0]


def _of_rank(value: jax.Array | float, site: str) -> jax.Array:
    value = jnp.asarray(value)
    return value if value.ndim else value.reshape((1,) * len(SITES[site].axes))
