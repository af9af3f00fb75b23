"""The small run's checkpoints through its parameter store, for the tests of the store."""

from __future__ import annotations

import pytest
from kvjax.converters.cached_loader import CachedLoader

from kvjax.artifacts.run_dir import RunDir
from kvjax.task.benchmark import Benchmark
from tests.helpers.stored_runs import TOKENS


@pytest.fixture
def benchmark(small_benchmark):
    """The small benchmark, opened."""
    return Benchmark.open(small_benchmark)


@pytest.fixture
def loader(small_run, benchmark):
    """Opens the small run's checkpoints through the store, as a fresh process would."""
    run = RunDir.open(small_run)
    return lambda **given: CachedLoader(run, benchmark, **{"certify_on": TOKENS, **given})
