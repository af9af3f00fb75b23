"""Weights of a checkpoint under the names that analyses use, whatever the parameter tree calls them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import jax
import numpy as np

from kvjax.model.params import Params

# The two matrices of a head: what queries are matched with, and what attended positions write.
HEAD_MATRICES = ("qk", "ov")


def head_output_kernels(params: Params, n_heads: int) -> jax.Array:
    """Cuts the output projections into what each head's z is multiplied by, [L, H, E, D]."""
    kernel = params["blocks"]["attn"]["out_proj"]["kernel"]  # [L, H E, D]
    return kernel.reshape(kernel.shape[0], n_heads, -1, kernel.shape[-1])


def mlp_output_kernels(params: Params) -> jax.Array:
    """Takes what each MLP's activations are multiplied by, [L, F, D]; of stacked checkpoints [C, L, F, D]."""
    return params["blocks"]["mlp"]["fc_out"]["kernel"]


def mlp_input_kernels(params: Params) -> jax.Array:
    """Takes what each MLP's input is multiplied by, after the LayerNorm, [L, D, F]."""
    return params["blocks"]["mlp"]["fc_in"]["kernel"]


def unembedding(params: Params) -> jax.Array:
    """Takes what the final state is multiplied by for each token's logit, [V, D]; of a tied model the embedding."""
    if "unembedding" in params:
        return params["unembedding"]["kernel"].T
    return params["token_embedding"]["embedding"]


def head_factors(params: Params, n_heads: int) -> np.ndarray:
    """Takes the thin factors of every head's W_QK = W_Q W_Kᵀ and W_OV = W_V W_O, in float64.

    The gain of the LayerNorm before the head is folded into W_Q, W_K and W_V; biases are left out.

    Returns:
      [matrices, 2, L, H, D, E], matrices as in `HEAD_MATRICES`: each is left · rightᵀ of its two factors.
      Source: Elhage et al., A Mathematical Framework for Transformer Circuits (2021).
    """
    attn, gain = params["blocks"]["attn"], np.asarray(params["blocks"]["ln_1"]["scale"], np.float64)
    n_layers, width = gain.shape

    def by_head(name: str) -> np.ndarray:
        kernel = np.asarray(attn[name]["kernel"], np.float64) * gain[:, :, None]
        return kernel.reshape(n_layers, width, n_heads, -1).swapaxes(1, 2)  # [L, H, D, E]

    out = np.asarray(head_output_kernels(params, n_heads), np.float64).swapaxes(2, 3)
    query, key, value = (by_head(name) for name in ("q_proj", "k_proj", "v_proj"))
    return np.stack([np.stack([query, key]), np.stack([value, out])])


def tensor_groups(n_layers: int) -> tuple[str, ...]:
    """Names the groups that a model's tensors form, a module's kernel and bias together, in forward order."""
    modules = ("ln_1", "q_proj", "k_proj", "v_proj", "out_proj", "ln_2", "fc_in", "fc_out")
    of_layers = (f"layer_{layer}_{module}" for layer in range(n_layers) for module in modules)
    return ("token_embedding", "position_embedding", *of_layers, "final_norm", "unembedding")


def grouped_tensors(params: Params) -> Mapping[str, list[np.ndarray]]:
    """Sorts a checkpoint's tensors by `tensor_groups`; a tied unembedding is no tensor, so that its group is absent."""
    groups: dict[str, list[np.ndarray]] = {}
    for path, leaf in _leaves(params):
        tensor = np.asarray(leaf)
        if path[0] != "blocks":
            groups.setdefault(path[0], []).append(tensor)
            continue
        for layer, own in enumerate(tensor):
            groups.setdefault(f"layer_{layer}_{path[-2]}", []).append(own)
    return groups


def _leaves(tree: Params, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], jax.Array]]:
    """Yields every tensor with its path, in an order that the tree's contents alone decide."""
    for name in sorted(tree):
        if isinstance(tree[name], Mapping):
            yield from _leaves(tree[name], (*path, name))
        else:
            yield (*path, name), tree[name]
