"""Distances between checkpoints' tensors by hand."""

from __future__ import annotations

import numpy as np
import pytest

from kvjax.measure.weight_changes import digest, squared_distances, squared_norms, update_cosine
from kvjax.model.weights import tensor_groups
from tests.helpers.weights import zeros

GROUPS = tensor_groups(2)


def test_groups_by_hand():
    """A module's kernel and bias are one group per layer, and an entry of either counts there alone."""
    params = zeros()
    params["blocks"]["attn"]["k_proj"]["kernel"][1, 2, 3] = 3
    params["blocks"]["attn"]["k_proj"]["bias"][1, 0] = 4
    params["final_norm"]["scale"][0] = 2
    expected = dict.fromkeys(GROUPS, 0.0) | {"layer_1_k_proj": 25.0, "final_norm": 4.0, "unembedding": np.nan}
    np.testing.assert_array_equal(squared_norms(params, 2), list(expected.values()))
    np.testing.assert_array_equal(squared_distances(params, zeros(), 2), list(expected.values()))


def test_distance_of_a_tied_model_to_an_untied():
    """Groups that both have are compared; the unembedding that only one has is missing."""
    found = dict(zip(GROUPS, squared_distances(zeros(), zeros(tied=False), 2), strict=True))
    assert np.isnan(found.pop("unembedding")) and set(found.values()) == {0.0}


def test_digest_of_parameters():
    """Equal parameters have one digest; the smallest change of any tensor gives another."""
    one = digest(zeros())
    np.testing.assert_array_equal(one, digest(zeros()))
    for path in (("blocks", "mlp", "fc_in", "bias"), ("token_embedding", "embedding")):
        changed = zeros()
        tensor = changed
        for name in path:
            tensor = tensor[name]
        tensor.flat[-1] = 1e-30
        assert (digest(changed) != one).any()


@pytest.mark.parametrize(
    ("updates", "cosine"),
    [(((3, 0), (0, 4)), 0), (((1, 0), (5, 0)), 1), (((2, 0), (-1, 0)), -1), (((0, 0), (1, 1)), np.nan)],
)
def test_cosine_of_two_updates(updates, cosine):
    """Three distances give the angle between two updates; an update of 0 has no direction."""
    before, own = (np.array(update, float) for update in updates)
    squares = [np.array([x @ x]) for x in (own, before, own + before)]
    np.testing.assert_allclose(update_cosine(*squares), [cosine], atol=1e-12)
