"""Programs that an earlier process traced: found again, the same to the bit, never where something changed."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.execution import export_cache
from kvjax.sweeps.measure_checkpoint import measure_checkpoints
from kvjax.task.benchmark import Benchmark
from tests.helpers.sweeping import small_program


@pytest.fixture
def folder(tmp_path, monkeypatch):
    begin_anew()
    monkeypatch.setattr(export_cache, "lowered_folder", lambda: tmp_path / "lowered")
    yield tmp_path / "lowered"
    begin_anew()


@pytest.fixture
def scaled():
    """A jitted function of a static argument and arrays, and the list of its traces."""
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def scaled(factor, x, rest):
        traces.append(factor)
        return [{"scaled": factor * x}, None, (rest["y"] + 1,)]

    return scaled, traces


def begin_anew():
    """Forgets what this process knows, as another one would begin."""
    jax.clear_caches()
    export_cache._calls.clear()


ARGS = (np.arange(3.0, dtype=np.float32), {"y": np.ones((2, 2), np.float32)})


def check(kept):
    first, nothing, (second,) = kept(*ARGS)
    np.testing.assert_array_equal(first["scaled"], [0, 2, 4])
    np.testing.assert_array_equal(second, np.full((2, 2), 2))
    assert nothing is None


def test_sweep_of_two_processes(folder, small_benchmark, monkeypatch):
    """A sweep is traced once for all processes, and measures the same to the bit."""
    traces = []

    @functools.wraps(measure_checkpoints.__wrapped__)
    def counted(*args):
        traces.append(args)
        return measure_checkpoints.__wrapped__(*args)

    def measured():
        begin_anew()
        monkeypatch.setattr("kvjax.sweeps.compiled_sweep.measure_checkpoints", jax.jit(counted, static_argnums=0))
        program, params = small_program(Benchmark.open(small_benchmark), 3)
        assert program.spec.placement.devices == 2, "the program is shared among devices"
        other = jax.tree.map(lambda x: x * 1.5, params)
        return [*program.measure([params, other]), *program.measure([other])]

    first, again = measured(), measured()
    assert len(traces) == 1
    monkeypatch.setattr(export_cache, "lowered_folder", lambda: None)
    direct = measured()
    assert len(traces) == 2
    for found in (first, again):
        jax.tree.map(np.testing.assert_array_equal, found, direct)


def test_damaged_file(folder, scaled):
    """A damaged file is made again."""
    function, traces = scaled
    check(export_cache.kept_lowered(function, 2, *ARGS))
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole[:60] + bytes([whole[60] ^ 1]) + whole[61:]):
        file.write_bytes(damaged)
        begin_anew()
        check(export_cache.kept_lowered(function, 2, *ARGS))
        assert export_cache._load(file) is not None
    assert traces == [2, 2, 2, 2]


@pytest.mark.parametrize("changed", ["static argument", "shape", "code", "setting"])
def test_key_of_a_program(folder, scaled, monkeypatch, request, changed):
    """A program is found by its static arguments, shapes, code and settings, not by values."""
    function, _ = scaled
    export_cache.kept_lowered(function, 2, *ARGS)
    export_cache.kept_lowered(function, 2, *jax.tree.map(lambda x: x + 1, ARGS))
    assert len(list(folder.iterdir())) == 1, "values do not matter"
    static, args = 2, ARGS
    if changed == "static argument":
        static = 3
    elif changed == "shape":
        args = (np.zeros(4, np.float32), ARGS[1])
    elif changed == "code":
        monkeypatch.setattr(export_cache, "CODE_SHA256", "other code")
    else:
        request.addfinalizer(lambda: jax.config.update("jax_default_matmul_precision", None))
        jax.config.update("jax_default_matmul_precision", "bfloat16")
    export_cache.kept_lowered(function, static, *args)
    assert len(list(folder.iterdir())) == 2


def test_equal_programs_of_one_process(folder, scaled):
    """Equal programs of one process are compiled once."""
    function, _ = scaled
    first = export_cache.kept_lowered(function, 2, *ARGS)
    assert export_cache.kept_lowered(function, 2, *ARGS) is first
    assert export_cache.kept_lowered(function, 3, *ARGS) is not first


def test_unused_programs(folder, scaled, monkeypatch):
    """Programs that were not used for long are removed."""
    function, traces = scaled
    monkeypatch.setattr(export_cache, "_KEPT_PROGRAMS", 2)

    def used(factor, at):
        begin_anew()
        before = set(folder.glob("*"))
        export_cache.kept_lowered(function, factor, *ARGS)
        for file in set(folder.glob("*")) - before:
            os.utime(file, (at, at))
        return traces.pop() if traces else None

    assert [used(factor, at=100 * factor) for factor in (2, 3)] == [2, 3], "traced"
    assert used(2, at=0) is None, "found, and so used last"
    assert used(4, at=400) == 4
    assert len(list(folder.iterdir())) == 2
    assert used(2, at=0) is None
    assert used(3, at=500) == 3, "it had been let go"


def test_export_without_cache(scaled, monkeypatch):
    """Nothing is kept if compiled programs are not."""
    monkeypatch.setattr(export_cache, "lowered_folder", lambda: None)
    function, traces = scaled
    kept = export_cache.kept_lowered(function, 2, jnp.zeros(3), {"y": jnp.zeros((2, 2))})
    assert traces == [], "traced at its first call, as ever"
    check(kept)


@pytest.mark.parametrize("cached", [True, False])
def test_programs_compiled_together(folder, scaled, monkeypatch, caplog, cached):
    """Calls find what was compiled ahead of them, whether or not lowered programs are kept."""
    function, _ = scaled
    if not cached:
        monkeypatch.setattr(export_cache, "lowered_folder", lambda: None)
    programs = [export_cache.kept_lowered(function, factor, *ARGS) for factor in (2, 3, 4)]
    export_cache.compile_together([(program, ARGS) for program in programs[:2]])
    with jax.log_compiles():
        found = [program(*ARGS)[0]["scaled"] for program in programs[:2]]
        assert "Finished XLA compilation" not in caplog.text
        programs[2](*ARGS)
        assert caplog.text.count("Finished XLA compilation") == 1, "the third is compiled when it is called"
    np.testing.assert_array_equal(found, [[0, 2, 4], [0, 3, 6]])
