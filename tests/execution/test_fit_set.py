"""Component means over the fit set, against PyTorch's activations averaged in plain loops."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from kvjax.converters.to_flax import to_flax

from kvjax.config.run import ModelConfig
from kvjax.errors import InputError
from kvjax.execution.fit_set import check_roles, component_means
from kvjax.model.decoder_config import DecoderConfig
from kvjax.task.benchmark import Benchmark
from kvjax.task.encoding import TOKEN_ROLES, bucket_by_length, encode_records
from tests.helpers.building import SMALL_MODEL, as_numpy, random_torch_model
from tests.oracles.patching import forward
from tests.oracles.pytorch_loops import roles_of

NUM_LAYERS, NUM_HEADS = SMALL_MODEL["n_layers"], SMALL_MODEL["n_heads"]


@pytest.fixture(scope="module")
def case(small_benchmark):
    """A random model's means over records of several lengths, the model and the records."""
    benchmark = Benchmark.open(small_benchmark)
    vocabulary = benchmark.vocabulary
    records = [*benchmark.read_split("train")[:7], *benchmark.read_split("structural_ood")[:4]]
    splits = ("train", "structural_ood")
    encoded = encode_records(records, vocabulary, splits, max_seq_len=SMALL_MODEL["max_seq_len"])
    settings = ModelConfig.model_validate(SMALL_MODEL)
    module = random_torch_model(SMALL_MODEL, len(vocabulary.tokens), 4, tied=True)
    params = to_flax(as_numpy(module), settings, len(vocabulary.tokens), where="test")
    (bucket,) = bucket_by_length(encoded, tokens_per_batch=4 * encoded.tokens.shape[1], max_buckets=1)
    assert -1 in bucket.indices, "no microbatch has a padding row"
    config = DecoderConfig.from_model_config(settings, len(vocabulary.tokens))
    means, _ = jax.jit(lambda params: component_means(params, config, bucket.batches, features=False))(params)
    return jax.device_get(means), module, records


def outputs_by_role(module, records):
    """Every token's outputs by role, one unpadded stream at a time: role -> (z [L, H, E], mlp_out [L, D])."""
    found = {}
    with torch.no_grad():
        for record in records:
            run = forward(module, torch.tensor([record["token_ids"]]))
            for t, role in enumerate(roles_of(record["tokens"])):
                z = [[run["z", layer, head][0, t].numpy() for head in range(NUM_HEADS)] for layer in range(NUM_LAYERS)]
                mlp_out = [run["mlp_out", layer][0, t].numpy() for layer in range(NUM_LAYERS)]
                found.setdefault(role, []).append((np.array(z), np.array(mlp_out)))
    return found


def test_role_means_of_components(case):
    """A role's mean is over the tokens of the role alone; the first token has its own, and padding counts nowhere."""
    means, module, records = case
    by_role = outputs_by_role(module, records)
    for index, role in enumerate((*TOKEN_ROLES, None)):  # the first token has no role as a target
        z, mlp_out = (np.mean(x, axis=0) for x in zip(*by_role[role], strict=True))
        np.testing.assert_allclose(means.by_role["head_z"][:, index], z, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(means.by_role["mlp_out"][:, index], mlp_out, rtol=1e-4, atol=1e-5)
    everything = [pair for pairs in by_role.values() for pair in pairs]
    z, mlp_out = (np.mean(x, axis=0) for x in zip(*everything, strict=True))
    np.testing.assert_allclose(means.overall["head_z"][:, 0, 0], z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(means.overall["mlp_out"][:, 0, 0], mlp_out, rtol=1e-4, atol=1e-5)


def test_a_role_the_fit_set_lacks(small_benchmark):
    """Records with a role that no token of the fit set has are refused by the role's name."""
    benchmark = Benchmark.open(small_benchmark)
    records = benchmark.read_split("train")[:2]
    encoded = encode_records(records, benchmark.vocabulary, ["train"], max_seq_len=SMALL_MODEL["max_seq_len"])
    check_roles(encoded, encoded)
    lacking = np.where(encoded.token_roles == TOKEN_ROLES.index("key_read"), -1, encoded.token_roles)
    with pytest.raises(InputError, match="none of key_read"):
        check_roles(dataclasses.replace(encoded, token_roles=lacking), encoded)
