"""Weights by the names that analyses use."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.model.transforms import over_layers
from kvjax.model.weights import head_output_kernels, mlp_output_kernels, unembedding

L, H, E, D, F, V = 3, 4, 6, 24, 10, 9


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        "blocks": {
            "attn": {"out_proj": {"kernel": rng.normal(size=(L, H * E, D))}},
            "mlp": {"fc_out": {"kernel": rng.normal(size=(L, F, D))}},
        },
        "token_embedding": {"embedding": rng.normal(size=(V, D))},
    }


def test_heads_outputs_sum_to_the_projection(params):
    """What the heads write, each through its own kernel, adds up to the projection of their joined z."""
    z_HxE = np.random.default_rng(1).normal(size=(H, E))
    written = sum(z_HxE[head] @ head_output_kernels(params, H)[1, head] for head in range(H))
    np.testing.assert_allclose(written, z_HxE.ravel() @ params["blocks"]["attn"]["out_proj"]["kernel"][1])


def test_mlp_output_kernels(params):
    """An MLP's kernel maps its activations to the residual stream."""
    assert mlp_output_kernels(params).shape == (L, F, D)


def test_unembedding_tied_and_untied(params):
    """A tied model reads tokens out by their embedding, an untied one by its own matrix, kept as [D, V]."""
    np.testing.assert_array_equal(unembedding(params), params["token_embedding"]["embedding"])
    own = np.random.default_rng(2).normal(size=(D, V))
    np.testing.assert_array_equal(unembedding(params | {"unembedding": {"kernel": own}}), own.T)


@pytest.mark.parametrize("n_layers", [1, 4])
def test_over_layers(n_layers):
    """Every layer is run once and in order; the last is known, the others are traced."""
    known = []

    def of_layer(layer):
        known.append(isinstance(layer, int))
        return {"square": jnp.asarray(layer) ** 2}

    found = jax.jit(lambda: over_layers(of_layer, n_layers))()
    assert found["square"].tolist() == [layer**2 for layer in range(n_layers)]
    assert known == ([True] if n_layers == 1 else [True, False])
