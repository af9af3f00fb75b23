"""Strict numerics for every test, and the small benchmark and runs that many of them share."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

import jax
import pytest
import torch

from kvjax.devices import CACHE_VARIABLE, use_compilation_cache
from kvjax.sweeps.compiled_sweep import CompiledSweep
from tests.helpers.building import write_run, write_small_benchmark
from tests.helpers.commands import compile_quickly

compile_quickly()
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 2)  # so that every sweep in the tests is shared among devices
# One cache of compiled programs for the run: its workers and the commands they start share it. It goes with the run.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ[CACHE_VARIABLE] = tempfile.mkdtemp(prefix="kvjax-test-")
    atexit.register(shutil.rmtree, os.environ[CACHE_VARIABLE], ignore_errors=True)
if jax.config.jax_compilation_cache_dir is None:
    use_compilation_cache()
torch.set_num_threads(1)  # on a busy machine PyTorch's waiting threads cost more than they do


@pytest.fixture(scope="session", autouse=True)
def _two_lengths_to_pad_to():
    """Sweeps under test pad to at most two lengths instead of three: each is a copy of the program to compile.

    Two are several: records of a bucket differ in length, and results are put together from both. The reference run is
    swept by a command of its own, as people run it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CompiledSweep.__init__.__kwdefaults__, "max_buckets", 2)
        yield


@pytest.fixture(scope="module", autouse=True)
def _programs_of_other_modules_are_let_go():
    """Each compiled program holds memory maps, of which a process may have some 65,000: all modules' are too many."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def small_benchmark(tmp_path_factory):
    """A small benchmark directory; tests only read it."""
    return write_small_benchmark(tmp_path_factory.mktemp("benchmark") / "small")


@pytest.fixture(scope="session")
def untied_run(tmp_path_factory, small_benchmark):
    """A run directory that tests only read; `small_run` is a copy to change."""
    return write_run(tmp_path_factory.mktemp("untied") / "run", small_benchmark)


@pytest.fixture
def small_run(untied_run, tmp_path):
    """A copy of a small run, for the test to change."""
    return shutil.copytree(untied_run, tmp_path / "run")
