"""A random model of PyTorch's, its Flax parameters, and pairs of every kind, for all tests of interventions."""

from __future__ import annotations

import pytest
from kvjax.converters.to_flax import to_flax

from kvjax.config.run import ModelConfig
from kvjax.model.decoder_config import DecoderConfig
from kvjax.task.benchmark import Benchmark
from kvjax.task.pair_encoding import encode_pairs
from kvjax.task.pairs import generate_pairs
from kvjax.task.probe_set import generate_probe_set
from tests.helpers.building import SMALL_MODEL, as_numpy, random_torch_model


@pytest.fixture(scope="session")
def pair_set(small_benchmark, tmp_path_factory):
    """Pairs of every kind from a small benchmark, and its vocabulary."""
    benchmark = Benchmark.open(small_benchmark)
    path = tmp_path_factory.mktemp("pairs") / "probe_set.jsonl"
    probe = generate_probe_set(benchmark, path, examples_per_split=8, fit_examples=16, seed=1)
    return generate_pairs(probe, benchmark, pairs_per_kind=5).pairs, benchmark.vocabulary


@pytest.fixture(scope="session")
def encoded(pair_set):
    """The pairs as arrays."""
    return encode_pairs(*pair_set, max_seq_len=SMALL_MODEL["max_seq_len"])


@pytest.fixture(scope="session")
def model(small_benchmark):
    vocab_size = len(Benchmark.open(small_benchmark).vocabulary.tokens)
    module = random_torch_model(SMALL_MODEL, vocab_size, 3, tied=False)
    settings = ModelConfig.model_validate(SMALL_MODEL)
    params = to_flax(as_numpy(module), settings, vocab_size, where="test")
    return module, params, DecoderConfig.from_model_config(settings, vocab_size, tied=False)


@pytest.fixture(scope="session")
def other_model(small_benchmark):
    vocab_size = len(Benchmark.open(small_benchmark).vocabulary.tokens)
    module = random_torch_model(SMALL_MODEL, vocab_size, 4, tied=False)
    return module, to_flax(as_numpy(module), ModelConfig.model_validate(SMALL_MODEL), vocab_size, where="test")
