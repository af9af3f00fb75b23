"""Weights of a checkpoint under the names that analyses use, whatever the parameter tree calls them."""

from __future__ import annotations

import jax

from kvjax.model.decoder import Params


def head_output_kernels(params: Params, n_heads: int) -> jax.Array:
    """Cuts the output projections into what each head's z is multiplied by, [L, H, E, D]."""
    kernel = params["blocks"]["attn"]["out_proj"]["kernel"]  # [L, H E, D]
    return kernel.reshape(kernel.shape[0], n_heads, -1, kernel.shape[-1])


def mlp_output_kernels(params: Params) -> jax.Array:
    """Takes what each MLP's activations are multiplied by, [L, F, D]; of stacked checkpoints [C, L, F, D]."""
    return params["blocks"]["mlp"]["fc_out"]["kernel"]


def unembedding(params: Params) -> jax.Array:
    """Takes what the final state is multiplied by for each token's logit, [V, D]; of a tied model the embedding."""
    if "unembedding" in params:
        return params["unembedding"]["kernel"].T
    return params["token_embedding"]["embedding"]
