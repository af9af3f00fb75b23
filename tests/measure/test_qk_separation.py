"""Separation of scores before the softmax against PyTorch's scores and the singular vectors of whole matrices."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from kvjax.converters.to_flax import to_flax

from kvjax.config.run import ModelConfig
from kvjax.measure.qk_separation import qk_separation
from kvjax.measure.weight_spectra import LEADING, head_spectra
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.restart import run_clean
from kvjax.task.benchmark import Benchmark
from kvjax.task.encoding import RELATION_GROUPS, encode_records
from tests.helpers.building import as_numpy, random_torch_model, read_lines
from tests.oracles.pytorch_loops import attention_scores, reads_of, separation

# Heads wider than the 8 directions that are kept.
WIDE = {"d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 16, "dropout": 0.0, "max_seq_len": 64}


@pytest.fixture(scope="module")
def measured(small_benchmark):
    """A PyTorch model, records, and the separations [L, B, H, Q] that are found of its Flax parameters."""
    benchmark = Benchmark.open(small_benchmark)
    vocabulary = benchmark.vocabulary
    records = read_lines(small_benchmark / "structural_ood.jsonl")[:2]
    module = random_torch_model(WIDE, len(vocabulary.tokens), 5, tied=False)
    settings = ModelConfig.model_validate(WIDE)
    params = to_flax(as_numpy(module), settings, len(vocabulary.tokens), where="test")
    config = DecoderConfig.from_model_config(settings, len(vocabulary.tokens), tied=False)
    encoded = encode_records(records, vocabulary, ["structural_ood"], max_seq_len=64)
    # A read whose support is the only value before it, as if the others were none.
    lone = encoded.relations[0, 0] * (np.arange(encoded.relations.shape[-1]) == encoded.support_positions[0, 0])
    encoded.relations[0, 0] = lone

    @jax.jit
    def measure(params, directions):
        _, clean = run_clean(params, config, encoded.tokens, ("embedding", "post_mlp"))
        return qk_separation(
            params,
            config,
            clean.trace,
            directions,
            prediction_positions_BxQ=encoded.prediction_positions,
            support_positions_BxQ=encoded.support_positions,
            relations_BxQxT=encoded.relations,
            value_relations=RELATION_GROUPS["value"],
        )

    directions = head_spectra(params, WIDE["n_heads"]).right[0].astype(np.float32)
    return module, records, jax.device_get(measure(params, directions))


@pytest.mark.parametrize(("index", "rank"), [(0, None), (1, LEADING)], ids=["whole", "rank 8"])
def test_separation_of_scores(measured, index, rank):
    """It is PyTorch's at every read and head, with W_QK whole or cut to 8 singular directions."""
    module, records, found = measured
    for n, record in enumerate(records):
        with torch.no_grad():
            scores = attention_scores(module, torch.tensor([record["token_ids"]]), rank)
        for q, read in enumerate(reads_of(record["tokens"])):
            expected = [[separation(of_head, read) for of_head in of_layer] for of_layer in scores]
            if (n, q) == (0, 0):
                expected = np.zeros((2, 2))  # as the relations have it
            np.testing.assert_allclose(found[index][:, n, :, q], expected, rtol=1e-4, atol=1e-5)


def test_separations_differ(measured):
    """The cut matters: wide heads lose some of the separation with it."""
    _, _, (whole, cut) = measured
    assert np.abs(whole - cut).max() > 0.01
