"""Measures the matrices of heads and MLPs by their weights alone (docs/definitions.md, "Weights")."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import threadpoolctl

from kvjax.model.params import Params
from kvjax.model.weights import head_factors

LEADING = 8  # singular directions of a head's matrix that are followed from checkpoint to checkpoint


@dataclasses.dataclass(frozen=True)
class HeadSpectra:
    """The singular values of every head's W_QK and W_OV, and the leading singular directions.

    Attributes:
      values: [matrices, L, H, E] largest first; matrices as in `HEAD_MATRICES`. The rank is at most the head's width.
      left, right: [matrices, L, H, D, R] the first R = min(`LEADING`, E) directions: of W_QK on the side of queries and
        of keys, of W_OV on the side that is read and that is written.
    """

    values: np.ndarray
    left: np.ndarray
    right: np.ndarray


def head_spectra(params: Params, n_heads: int) -> HeadSpectra:
    """Decomposes every head's W_QK and W_OV, LayerNorm gains folded in, in float64.

    A product of [D, E] and [E, D] has the singular values of R_left R_rightᵀ, which is [E, E], if Q R are the factors'
    QR decompositions. Its directions are those of the small product, times Q.
    """
    factors = head_factors(params, n_heads)
    # Threads of BLAS wait by spinning: beside busy devices they take many times the work's own time.
    with _blas().limit(limits=1, user_api="blas"):
        q, r = np.linalg.qr(factors)
        u, values, v_transposed = np.linalg.svd(r[:, 0] @ r[:, 1].swapaxes(-1, -2))
    rank = min(LEADING, values.shape[-1])
    right = v_transposed[..., :rank, :].swapaxes(-1, -2)
    return HeadSpectra(values, q[:, 0] @ u[..., :rank], q[:, 1] @ right)


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    """Finds the process's thread pools, once: looking for them takes a millisecond."""
    return threadpoolctl.ThreadpoolController()


def effective_rank(values_xN: np.ndarray) -> np.ndarray:
    """Computes exp of the entropy of the singular values' shares of their sum, [...]; NaN if all are 0.

    Source: Roy & Vetterli, The effective rank: a measure of effective dimensionality (2007).
    """
    total = values_xN.sum(axis=-1, keepdims=True)
    shares = np.divide(values_xN, total, out=np.full(values_xN.shape, np.nan), where=total > 0)
    return np.exp(-np.sum(shares * np.log(np.where(shares > 0, shares, 1.0)), axis=-1))


def participation_ratio(values_xN: np.ndarray) -> np.ndarray:
    """Computes (Σσ²)² / Σσ⁴ of singular values, [...]: how many directions share the squared norm; NaN if all are 0."""
    # Values are first divided by the largest: fourth powers of small ones would underflow.
    largest = values_xN.max(axis=-1, keepdims=True)
    squares = np.divide(values_xN, largest, out=np.full(values_xN.shape, np.nan), where=largest > 0) ** 2
    return squares.sum(axis=-1) ** 2 / np.sum(squares**2, axis=-1)


def direction_overlap(spectra: HeadSpectra, others: HeadSpectra) -> np.ndarray:
    """Measures which share of the leading directions' subspace two checkpoints have in common, [matrices, L, H].

    It is the mean squared cosine of the principal angles, ‖UᵀU'‖²_F / R, averaged over the left and the right side: 1
    if both span the same, R / D for random ones. Rotations among the leading directions leave it as it is.
    """

    def of_side(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sum((a.swapaxes(-1, -2) @ b) ** 2, axis=(-1, -2)) / a.shape[-1]

    return (of_side(spectra.left, others.left) + of_side(spectra.right, others.right)) / 2
