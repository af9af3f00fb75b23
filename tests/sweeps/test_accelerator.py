"""The sweep as it is cut for an accelerator: heads and checkpoints side by side, whole probe sets at once."""

import jax
import numpy as np
import pytest

from kvjax.execution.memory_plan import checkpoint_bytes
from kvjax.model.decoder import Decoder
from kvjax.model.decoder_config import DecoderConfig
from kvjax.sweeps import compiled_sweep
from kvjax.sweeps.ablations import restarts_at_once
from kvjax.sweeps.compiled_sweep import CompiledSweep
from kvjax.sweeps.measure_checkpoint import measure_checkpoints
from kvjax.sweeps.settings import ABLATIONS, SweepSettings
from kvjax.task.benchmark import Benchmark
from kvjax.task.encoding import encode_records
from tests.helpers.sweeping import swept_models

SETTINGS = SweepSettings(ablations=ABLATIONS, resample_draws=2, checkpoint_batch="2")
SPLITS = ["validation_iid", "test_iid"]


@pytest.fixture(scope="module")
def sweep_of(small_benchmark):
    """Returns a function that makes the program of a sweep, and two checkpoints."""
    benchmark = Benchmark.open(small_benchmark)
    vocabulary = benchmark.vocabulary
    records = [record for split in SPLITS for record in benchmark.read_split(split)[:8]]
    fit = benchmark.read_split("train")[:24]
    encoded, fitted = (encode_records(x, vocabulary, [*SPLITS, "train"], max_seq_len=64) for x in (records, fit))
    shape = {"d_model": 8, "n_layers": 3, "n_heads": 2, "d_ff": 12, "max_seq_len": 64}
    config = DecoderConfig(vocab_size=len(vocabulary.tokens), **shape)
    some_tokens = np.ones((1, 4), np.int32)
    params = [Decoder(config).init(jax.random.key(seed), some_tokens)["params"] for seed in (0, 1)]

    def make(settings=SETTINGS):
        return CompiledSweep(config, vocabulary, encoded, len(SPLITS), settings, fit=fitted, max_buckets=1)

    return make, jax.tree.map(np.asarray, params)


@pytest.fixture
def on_accelerator(monkeypatch):
    as_here = compiled_sweep.plan_chunks

    def plan(*args, **given):
        return as_here(*args, **given | {"backend": "gpu", "num_devices": 1})

    monkeypatch.setattr(compiled_sweep, "plan_chunks", plan)


def test_side_by_side(sweep_of, monkeypatch, request):
    """Checkpoints and heads side by side measure the same as one after another."""
    make, params = sweep_of
    expected = make().measure(params)
    request.getfixturevalue("on_accelerator")
    program = make()
    assert (program.spec.placement.lift, program.spec.interventions) == ("vmap", "vmap")
    assert all(len(bucket.batches.tokens) == 1 for bucket in program.buckets), "whole buckets at once"
    for ours, theirs in zip(program.measure(params), expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, x in theirs.items():
            np.testing.assert_allclose(ours[name], x, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_export_for_accelerators(sweep_of, on_accelerator, platform):
    """No operation of it lacks a lowering there, or is one that JAX refuses to export."""
    make, params = sweep_of
    program = make()
    leaves, tree = jax.tree.flatten((swept_models(params, 2), program.data))

    def of_leaves(*leaves):
        return measure_checkpoints(program.spec, *jax.tree.unflatten(tree, leaves))

    exported = jax.export.export(jax.jit(of_leaves), platforms=[platform])(*leaves)
    assert jax.export.deserialize(exported.serialize()).platforms == (platform,)


@pytest.mark.parametrize("draws", [1, 6])
def test_memory_estimate(sweep_of, on_accelerator, draws):
    """By the compiler's own account, here of a CPU; and by no more than a few times, or memory would lie idle."""
    make, params = sweep_of
    settings = SweepSettings(ablations=("zero", "resample"), resample_draws=draws, probe="none", checkpoint_batch="2")
    program = make(settings)
    compiled = measure_checkpoints.lower(program.spec, swept_models(params, 2), program.data).compile()
    needed = compiled.memory_analysis().temp_size_in_bytes
    (bucket,) = program.buckets
    tokens, config = bucket.batches.tokens.size, program.spec.config
    at_once = restarts_at_once(config, settings.ablations, draws=draws)
    estimate = 2 * checkpoint_bytes(config, kept_tokens=tokens, tokens_per_batch=tokens, side_by_side=at_once)
    assert needed < estimate < 4 * needed
