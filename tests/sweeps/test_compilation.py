"""What is compiled: one program per shape, whatever the number of checkpoints and however deep the model."""

import dataclasses

import chex
import jax
import pytest

from kvjax.sweeps.measure_checkpoint import measure_checkpoint, measure_checkpoints
from kvjax.sweeps.settings import ABLATIONS
from kvjax.task.benchmark import Benchmark
from tests.helpers.sweeping import SMALL_SWEEP, small_program, swept_models


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
    model = jax.tree.map(lambda x: x[0], swept_models([params], static.config.n_heads))
    return list(operations(jax.make_jaxpr(lambda m, d: measure_checkpoint(static, m, d))(model, data).jaxpr))


def test_traces_of_chunks(small_benchmark, monkeypatch):
    """Chunks are filled up, so that 1, 2 or 5 checkpoints are the same program."""
    chex.clear_trace_counter()
    counted = jax.jit(chex.assert_max_traces(measure_checkpoints.__wrapped__, n=1), static_argnums=0)
    monkeypatch.setattr("kvjax.sweeps.compiled_sweep.measure_checkpoints", counted)
    monkeypatch.setattr("kvjax.execution.export_cache.lowered_folder", lambda: None)  # no other test's program
    program, params = small_program(Benchmark.open(small_benchmark), 3)
    for number in (2, 1, 2):
        assert len(program.measure([params] * number)) == number


def test_program_size(small_benchmark):
    """The program does not grow with depth."""
    sizes = []
    for n_layers in (3, 6, 9):
        sizes.append(len(traced(*small_program(Benchmark.open(small_benchmark), n_layers))))
    assert sizes[0] > 500, "the program was counted"
    # Stacking stages names each layer once, nothing else may.
    assert max(sizes) - min(sizes) <= 12, sizes


@pytest.mark.parametrize("precision", ["highest", "default"])
def test_precision_of_products(small_benchmark, precision):
    """A CPU multiplies float32 in full either way; a GPU may not."""
    probe = "ridge" if precision == "highest" else "none"  # probes are exact either way
    settings = dataclasses.replace(SMALL_SWEEP, ablations=ABLATIONS, precision=precision, probe=probe)
    program, params = small_program(Benchmark.open(small_benchmark), 3, settings, fit=True)
    found = [op.params["precision"] for op in traced(program, params) if op.primitive.name == "dot_general"]
    exact = [p == (jax.lax.Precision.HIGHEST,) * 2 for p in found]
    assert len(found) > 50
    # Sums over reads and what all microbatches share stay exact whatever is asked of the model's own products.
    assert all(exact) if precision == "highest" else sum(exact) < len(exact) / 4, sum(exact)
