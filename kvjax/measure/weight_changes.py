"""Measures how far a checkpoint's tensors lie from another's (docs/definitions.md, "Weights")."""

from __future__ import annotations

import hashlib

import numpy as np

from kvjax.model.params import Params
from kvjax.model.weights import grouped_tensors, tensor_groups


def squared_norms(params: Params, n_layers: int) -> np.ndarray:
    """Sums the squares of each tensor group, [groups] as in `tensor_groups`, in float64; NaN if there is none."""
    groups = grouped_tensors(params)
    return np.array([_sum_of_squares(groups.get(name)) for name in tensor_groups(n_layers)])


def squared_distances(params: Params, others: Params, n_layers: int) -> np.ndarray:
    """Sums the squared differences of each tensor group between two checkpoints, [groups], in float64.

    It is 0 only if the tensors are equal. It is NaN for the unembedding if one of the two is tied.
    """
    own, other = grouped_tensors(params), grouped_tensors(others)

    def differences(name: str) -> list[np.ndarray] | None:
        if name not in own or name not in other:
            return None
        return [a.astype(np.float64) - b for a, b in zip(own[name], other[name], strict=True)]

    return np.array([_sum_of_squares(differences(name)) for name in tensor_groups(n_layers)])


def digest(params: Params) -> np.ndarray:
    """Hashes every bit of a checkpoint's parameters, uint8 [32]."""
    hashed = hashlib.sha256()
    for name, tensors in grouped_tensors(params).items():
        hashed.update(name.encode())
        for tensor in tensors:
            hashed.update(np.ascontiguousarray(tensor))
    return np.frombuffer(hashed.digest(), np.uint8)


def update_cosine(own: np.ndarray, before: np.ndarray, both: np.ndarray) -> np.ndarray:
    """Computes the cosine between two successive updates from squared distances, by the law of cosines.

    Args:
      own: [...] between a checkpoint and the previous one.
      before: [...] between the previous one and that before it.
      both: [...] between the first and the last of the three.

    Returns:
      [...]; NaN if one of the updates is 0.
    """
    product = np.sqrt(own * before)
    return np.divide(both - own - before, 2 * product, out=np.full(product.shape, np.nan), where=product > 0)


def _sum_of_squares(tensors: list[np.ndarray] | None) -> float:
    if tensors is None:
        return np.nan
    flat = (tensor.astype(np.float64, copy=False).ravel() for tensor in tensors)
    # Not `dot`: BLAS would start threads for it, which take the cores from the devices.
    return float(sum(np.einsum("n,n->", x, x) for x in flat))
