"""Checks the arguments of the public functions that would otherwise change nothing, or another place, in silence.

Of traced layers, heads, masks and tokens only shape and type are known before a program runs, so only those are
checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.errors import InputError, bad_argument
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.sites import SITE_ORDER, SITES


def checked_tokens(config: DecoderConfig, tokens_BxT: Any, name: str = "tokens_BxT") -> jax.Array:
    """Checks token ids and puts them on the device.

    Raises:
      InputError: they are no array, or have other axes, more positions than the model, or ids outside the vocabulary.
    """
    tokens = _checked_array(tokens_BxT, name)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise bad_argument(name, "whole numbers of shape [B, T]", f"{tokens.dtype} of shape {list(tokens.shape)}")
    if tokens.shape[1] > config.max_seq_len:
        raise bad_argument(name, f"at most max_seq_len {config.max_seq_len} tokens", tokens.shape[1])
    if not isinstance(tokens, jax.core.Tracer) and tokens.size:
        known = np.asarray(tokens)  # of a known array inside a program, JAX would trace the extremes
        low, high = int(known.min()), int(known.max())
        if low < 0 or high >= config.vocab_size:
            raise bad_argument(name, f"ids from 0 to {config.vocab_size - 1}", low if low < 0 else high)
    return jnp.asarray(tokens)


def checked_pair(config: DecoderConfig, tokens_BxT: Any, source_tokens_BxT: Any) -> tuple[jax.Array, jax.Array]:
    """Checks the token ids of two runs; raises `InputError` if one is unusable or they differ in shape."""
    tokens = checked_tokens(config, tokens_BxT)
    source = checked_tokens(config, source_tokens_BxT, "source_tokens_BxT")
    if tokens.shape != source.shape:
        raise bad_argument("source_tokens_BxT", f"the shape of tokens_BxT, {list(tokens.shape)}", list(source.shape))
    return tokens, source


def checked_mask(mask: Any, shape: Sequence[int], name: str) -> jax.Array:
    """Checks a mask of heads, MLPs or positions and puts it on the device.

    Raises:
      InputError: it is no array of truth values, or has another shape, which would be spread over other places.
    """
    mask = _checked_array(mask, name)
    if mask.shape != tuple(shape) or mask.dtype != bool:
        raise bad_argument(name, f"truth values of shape {list(shape)}", f"{mask.dtype} of shape {list(mask.shape)}")
    return jnp.asarray(mask)


def check_place(config: DecoderConfig, site: str, layer: Any, head: Any, prefix: str = "") -> None:
    """Checks that a site, a layer and a head name a place of the model; `prefix` begins the argument names.

    Raises:
      InputError: there is no such site, layer or head, one is not a single whole number, or the site has no heads.
    """
    known = [name for name in SITES if name != "pattern"]  # a mask of positions would not say which of its two axes
    if site not in known:
        raise InputError(f"expected a site among {', '.join(known)}; found {site}")
    axes = SITES[site].axes
    if "L" in axes:
        _check_number(layer, config.n_layers, f"{prefix}layer")
    elif layer is not None and _known_number(layer, f"{prefix}layer"):
        raise bad_argument(f"{prefix}layer", f"none, for {site} is not of one layer", layer)
    if head is None:
        return
    if "H" not in axes:
        raise bad_argument(f"{prefix}head", f"none, for {site} is not of one head", head)
    _check_number(head, config.n_heads, f"{prefix}head")


def check_path(config: DecoderConfig, sender: str, sender_layer: Any, receiver: str, receiver_layer: Any) -> None:
    """Checks that a receiver comes after its sender; raises `InputError` if it does not."""
    from_layer, to_layer = (
        _known_number(layer, name) if SITES[site].per_layer else (-1 if site == "embedding" else config.n_layers)
        for site, layer, name in (
            (sender, sender_layer, "sender_layer"),
            (receiver, receiver_layer, "receiver_layer"),
        )
    )
    if from_layer is None or to_layer is None:
        return
    if (to_layer, SITE_ORDER[receiver]) <= (from_layer, SITE_ORDER[sender]):
        raise bad_argument(
            "path_patch",
            "a receiver after its sender",
            f"{receiver} of layer {to_layer}, which {sender} of layer {from_layer} does not reach",
        )


def _check_number(chosen: Any, size: int, name: str) -> None:
    number = _known_number(chosen, name)
    if number is not None and not 0 <= number < size:
        raise bad_argument(name, f"one from 0 to {size - 1}", number)


def _known_number(chosen: Any, name: str) -> int | None:
    """Reads the number of a layer or head; None if it is traced.

    Raises:
      InputError: it is not one whole number.
    """
    if not isinstance(chosen, int | np.integer | np.ndarray | jax.Array):
        raise bad_argument(name, "one whole number", chosen)
    kind, shape = (chosen.dtype, chosen.shape) if hasattr(chosen, "dtype") else (np.asarray(chosen).dtype, ())
    if shape or not np.issubdtype(kind, np.integer):
        traced = isinstance(chosen, jax.core.Tracer)
        raise bad_argument(name, "one whole number", f"{kind} of shape {list(shape)}" if traced else chosen)
    return None if isinstance(chosen, jax.core.Tracer) else int(chosen)


def _checked_array(value: Any, name: str) -> np.ndarray | jax.Array:
    """Passes an array on; raises `InputError` for anything else, such as a list."""
    if not isinstance(value, np.ndarray | jax.Array):
        raise bad_argument(name, "an array", f"a {type(value).__name__} (jnp.asarray makes an array of numbers)")
    return value
