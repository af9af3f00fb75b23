"""What is compiled: one program per shape, whatever the number of checkpoints and however deep the model."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from kvjax.model.decoder import Decoder, DecoderConfig
from kvjax.sweeps.compiled_sweep import CompiledSweep
from kvjax.sweeps.measure_checkpoint import measure_checkpoint, measure_checkpoints
from kvjax.sweeps.settings import ABLATIONS, SweepSettings
from kvjax.task.benchmark import Benchmark
from kvjax.task.encoding import encode_records

SPLIT = "validation_iid"
SETTINGS = SweepSettings(ablations=("zero",), probe="none", checkpoint_batch="2")


def probe_program(benchmark, n_layers, settings=SETTINGS, *, fit=False):
    vocabulary = benchmark.vocabulary
    encoded = encode_records(benchmark.read_split(SPLIT)[:12], vocabulary, [SPLIT], max_seq_len=64)
    shape = {"d_model": 8, "n_layers": n_layers, "n_heads": 2, "d_ff": 12, "max_seq_len": 64}
    config = DecoderConfig(vocab_size=len(vocabulary.tokens), **shape)
    params = Decoder(config).init(jax.random.key(0), np.ones((1, 4), np.int32))["params"]
    fitted = encoded if fit else None
    program = CompiledSweep(config, vocabulary, encoded, 1, settings, fit=fitted, max_buckets=1)
    return program, jax.tree.map(np.asarray, params)


def operations(jaxpr):
    """Yields the equations of a program, those of its loops and branches included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from operations(inner)


def traced(program, params):
    """Returns the operations of the program that measures one checkpoint."""
    static, data = program.spec, program.data
    return list(operations(jax.make_jaxpr(lambda p, d: measure_checkpoint(static, p, d))(params, data).jaxpr))


def test_one_trace_serves_any_number_of_checkpoints(small_benchmark, monkeypatch):
    """Chunks are filled up, so that 1, 2 or 5 checkpoints are the same program."""
    chex.clear_trace_counter()
    counted = jax.jit(chex.assert_max_traces(measure_checkpoints.__wrapped__, n=1), static_argnums=0)
    monkeypatch.setattr("kvjax.sweeps.compiled_sweep.measure_checkpoints", counted)
    monkeypatch.setattr("kvjax.execution.export_cache.lowered_folder", lambda: None)  # no other test's program
    program, params = probe_program(Benchmark.open(small_benchmark), 3)
    for number in (2, 1, 2):
        assert len(program.measure([params] * number)) == number


def test_the_program_does_not_grow_with_depth(small_benchmark):
    sizes = []
    for n_layers in (3, 6, 9):
        sizes.append(len(traced(*probe_program(Benchmark.open(small_benchmark), n_layers))))
    assert sizes[0] > 500, "the program was counted"
    # Stacking stages names each layer once, nothing else may.
    assert max(sizes) - min(sizes) <= 12, sizes


@pytest.mark.parametrize("precision", ["highest", "default"])
def test_every_product_has_the_precision_asked_for(small_benchmark, precision):
    """A CPU multiplies float32 in full either way; a GPU may not."""
    probe = "ridge" if precision == "highest" else "none"  # probes are exact either way
    settings = dataclasses.replace(SETTINGS, ablations=ABLATIONS, precision=precision, probe=probe)
    program, params = probe_program(Benchmark.open(small_benchmark), 3, settings, fit=True)
    found = [op.params["precision"] for op in traced(program, params) if op.primitive.name == "dot_general"]
    exact = [p == (jax.lax.Precision.HIGHEST,) * 2 for p in found]
    assert len(found) > 50
    # Sums over reads and what all microbatches share stay exact whatever is asked of the model's own products.
    assert all(exact) if precision == "highest" else sum(exact) < len(exact) / 4, sum(exact)
