"""Direct logit attribution: its terms sum to the logit difference that PyTorch computes."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from kvjax.converters.to_flax import to_flax

from kvjax.config.run import ModelConfig
from kvjax.measure.attribution import direct_logit_attribution
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.transforms import plain_forward
from tests.helpers.building import SMALL_MODEL, as_numpy, random_torch_model

VOCAB, VALUES = 30, np.arange(12, 30)


@pytest.mark.parametrize("tied", [True, False])
def test_sum_of_terms(tied):
    """The attribution terms sum to the logit difference."""
    module = random_torch_model(SMALL_MODEL, VOCAB, 3, tied=tied)
    model = ModelConfig.model_validate(SMALL_MODEL)
    params = to_flax(as_numpy(module), model, VOCAB, where="test")
    config = DecoderConfig.from_model_config(model, VOCAB, tied="unembedding" not in params)
    tokens = np.random.default_rng(0).integers(1, VOCAB, (4, 9)).astype(np.int32)
    answers = np.random.default_rng(1).choice(VALUES, (4, 9))
    sites = ("embedding", "head_z", "mlp_out", "post_mlp")
    _, trace = plain_forward(config)(params, tokens, capture=sites)
    terms = direct_logit_attribution(params, trace, jnp.asarray(answers), jnp.asarray(VALUES))
    assert set(terms) == {"embedding", "final_norm_bias", "head", "attn_bias", "mlp"}
    parts = [terms["embedding"], terms["final_norm_bias"], terms["attn_bias"].sum(0), terms["mlp"].sum(0)]
    total = sum(parts) + terms["head"].sum((0, 2))
    size = sum(np.abs(x) for x in (terms["embedding"], terms["final_norm_bias"])) + sum(
        np.abs(terms[name]).sum(0) for name in ("attn_bias", "mlp")
    )
    size = size + np.abs(terms["head"]).sum((0, 2))
    with torch.no_grad():
        logits = module(torch.from_numpy(tokens.astype(np.int64))).numpy()
    expected = np.take_along_axis(logits, answers[..., None], axis=-1)[..., 0] - logits[..., VALUES].mean(-1)
    assert np.abs(expected).max() > 0.1
    assert (np.abs(total - expected) <= 1e-4 * size).all()
