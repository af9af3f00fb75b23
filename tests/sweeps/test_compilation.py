"""What is compiled: one program per shape, whatever the number of checkpoints and however deep the model."""

import chex
import jax
import numpy as np

from kvjax.model.decoder import Decoder, DecoderConfig
from kvjax.sweeps.program import measure_checkpoint, measure_checkpoints
from kvjax.sweeps.stream import ProbeProgram, SweepSettings
from kvjax.task.benchmark import Benchmark
from kvjax.task.encoding import encode_records

SPLIT = "validation_iid"
SETTINGS = SweepSettings(ablations=("zero",), probe="none", checkpoint_batch="2")


def probe_program(benchmark, n_layers, settings=SETTINGS):
    vocabulary = benchmark.vocabulary
    encoded = encode_records(benchmark.read_split(SPLIT)[:12], vocabulary, [SPLIT], max_seq_len=64)
    shape = {"d_model": 8, "n_layers": n_layers, "n_heads": 2, "d_ff": 12, "max_seq_len": 64}
    config = DecoderConfig(vocab_size=len(vocabulary.tokens), **shape)
    params = Decoder(config).init(jax.random.key(0), np.ones((1, 4), np.int32))["params"]
    program = ProbeProgram(config, vocabulary, encoded, 1, settings, max_buckets=1)
    return program, jax.tree.map(np.asarray, params)


def count_operations(jaxpr):
    """Returns the number of equations of a program, those of its loops and branches included."""
    total = 0
    for equation in jaxpr.eqns:
        total += 1
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                total += count_operations(inner) if hasattr(inner, "eqns") else 0
    return total


def test_one_trace_serves_any_number_of_checkpoints(small_benchmark, monkeypatch):
    """Chunks are filled up, so that 1, 2 or 5 checkpoints are the same program."""
    chex.clear_trace_counter()
    counted = jax.jit(chex.assert_max_traces(measure_checkpoints.__wrapped__, n=1), static_argnums=0)
    monkeypatch.setattr("kvjax.sweeps.stream.measure_checkpoints", counted)
    monkeypatch.setattr("kvjax.sweeps.lowered.lowered_folder", lambda: None)  # no other test's program
    program, params = probe_program(Benchmark.open(small_benchmark), 3)
    for number in (2, 1, 2):
        assert len(program.measure([params] * number)) == number


def test_the_program_does_not_grow_with_depth(small_benchmark):
    sizes = []
    for n_layers in (3, 6, 9):
        program, params = probe_program(Benchmark.open(small_benchmark), n_layers)
        static, data = program.program, program.data
        traced = jax.make_jaxpr(lambda p, d, static=static: measure_checkpoint(static, p, d))(params, data)
        sizes.append(count_operations(traced.jaxpr))
    assert sizes[0] > 500, "the program was counted"
    # Stacking stages names each layer once, nothing else may.
    assert max(sizes) - min(sizes) <= 12, sizes
