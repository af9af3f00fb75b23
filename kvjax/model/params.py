"""A decoder's parameters as a tree, with the layers stacked: slicing a layer out, stacking checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

Params = dict[str, Any]


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
