"""Converts a layer-stacked Flax parameter tree to a PyTorch `model_state`."""

from __future__ import annotations

import functools
import operator

import numpy as np
import torch
from kvjax.converters.parameter_names import TOKEN_EMBEDDING, UNEMBEDDING, torch_names

from kvjax.model.params import Params


def to_torch(params: Params) -> dict[str, torch.Tensor]:
    """Converts a parameter tree to a `model_state` with the reference trainer's names, shapes and order.

    A tied unembedding shares the token embedding's tensor, as PyTorch saves it.
    """
    n_layers = len(params["blocks"]["ln_1"]["scale"])
    state: dict[str, torch.Tensor] = {}
    for name, parameter, layer in torch_names(n_layers):
        if parameter is UNEMBEDDING and "unembedding" not in params:
            state[name] = state[TOKEN_EMBEDDING.torch]
            continue
        leaf = np.asarray(functools.reduce(operator.getitem, parameter.flax, params))
        leaf = leaf[layer] if parameter.per_layer else leaf
        leaf = leaf.T if parameter.transposed else leaf
        state[name] = torch.from_numpy(np.array(leaf, order="C"))  # a copy: the tree may be read-only
    return state
