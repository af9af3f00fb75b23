"""Spectra of heads' matrices against NumPy's of the whole matrices, and hand-made directions."""

from __future__ import annotations

import numpy as np
import pytest
from kvjax.converters.to_flax import to_flax

from kvjax.config.run import ModelConfig
from kvjax.measure.weight_spectra import (
    LEADING,
    HeadSpectra,
    direction_overlap,
    effective_rank,
    head_spectra,
    participation_ratio,
)
from tests.helpers.building import SMALL_MODEL, as_numpy, random_torch_model

WIDTH = SMALL_MODEL["d_model"] // SMALL_MODEL["n_heads"]


@pytest.fixture(scope="module")
def model():
    """A random PyTorch model, and its Flax parameters."""
    module = random_torch_model(SMALL_MODEL, 20, 3, tied=True)
    return module, to_flax(as_numpy(module), ModelConfig.model_validate(SMALL_MODEL), 20, where="test")


def dense(module, layer, head):
    """Forms W_QK and W_OV of a head from PyTorch's weights, [D, D], with the LayerNorm's gain on the rows it scales."""
    attn, gain = module.blocks[layer].attn, np.diag(module.blocks[layer].ln_1.weight.detach().numpy())
    rows = slice(head * WIDTH, (head + 1) * WIDTH)
    query, key, value = (m.weight[rows].detach().numpy() for m in (attn.q_proj, attn.k_proj, attn.v_proj))
    out = attn.out_proj.weight[:, rows].detach().numpy()
    return gain @ query.T @ key @ gain, gain @ value.T @ out.T


@pytest.mark.parametrize(("layer", "head"), [(0, 0), (2, 3)])
def test_spectra_of_dense_matrices(model, layer, head):
    """Singular values and leading directions are those of the whole matrices, gains folded in."""
    module, params = model
    found = head_spectra(params, SMALL_MODEL["n_heads"])
    for index, matrix in enumerate(dense(module, layer, head)):
        left, values, right = np.linalg.svd(matrix.astype(np.float64))
        np.testing.assert_allclose(found.values[index, layer, head], values[:WIDTH], rtol=1e-4, atol=1e-6)
        # Directions are known up to their sign, and up to rotations if values are equal: projections are compared.
        for ours, whole in ((found.left, left), (found.right, right.T)):
            basis = ours[index, layer, head]
            projection = whole[:, : basis.shape[1]] @ whole[:, : basis.shape[1]].T
            np.testing.assert_allclose(basis @ basis.T, projection, atol=1e-3)


def test_leading_directions_of_wide_heads(model):
    """No more than eight directions are followed, and no more than a head has."""
    found = head_spectra(model[1], SMALL_MODEL["n_heads"])
    assert found.left.shape[-1] == found.right.shape[-1] == min(LEADING, WIDTH)


@pytest.mark.parametrize(
    ("values", "rank", "ratio"),
    [
        ([3.0, 3.0, 3.0, 3.0], 4, 4),
        ([5.0, 0.0, 0.0, 0.0], 1, 1),
        ([2.0, 1.0], np.exp(np.log(3) - np.log(4) / 3), 25 / 17),
    ],
)
def test_ranks_by_hand(values, rank, ratio):
    """Equal values count each, a single one counts as one, and values in between as their formulas say."""
    for scale in (1.0, 1e-100):
        np.testing.assert_allclose(effective_rank(np.array(values) * scale), rank)
        np.testing.assert_allclose(participation_ratio(np.array(values) * scale), ratio)


def test_ranks_of_an_empty_matrix():
    """A matrix of zeros has no rank to speak of: null rather than 0 or an error."""
    assert np.isnan([effective_rank(np.zeros(4)), participation_ratio(np.zeros(4))]).all()


def spanning(*columns, width=6):
    """Makes spectra whose leading directions are given unit vectors, on both sides."""
    basis = np.eye(width)[:, list(columns)][None, None, None]
    return HeadSpectra(np.ones((1, 1, 1, len(columns))), basis, basis)


def test_overlap_by_hand():
    """The overlap is 1 for the same span in any order, the shared part of it otherwise, and 0 for orthogonal spans."""
    own = spanning(0, 1)
    assert direction_overlap(own, spanning(1, 0)).item() == 1
    assert direction_overlap(own, spanning(1, 2)).item() == pytest.approx(0.5)
    assert direction_overlap(own, spanning(2, 3)).item() == 0
    # Turned by 60 degrees in the plane of axes 1 and 2: cosine 1/2, squared 1/4.
    turned = np.zeros((1, 1, 1, 6, 2))
    turned[..., 0, 0], turned[..., 1, 1], turned[..., 2, 1] = 1, 0.5, np.sqrt(0.75)
    one_side = HeadSpectra(own.values, turned, own.right)
    assert direction_overlap(own, one_side).item() == pytest.approx((1.25 / 2 + 1) / 2)
