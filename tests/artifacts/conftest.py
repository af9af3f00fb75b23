"""Two swept runs of one shape, for tests that damage their files."""

from __future__ import annotations

import shutil

import pytest

from tests.helpers.building import write_run
from tests.helpers.sweeping import sweep


@pytest.fixture(scope="module")
def swept_runs(tmp_path_factory, untied_run, small_benchmark):
    """The small run and another, each swept once with the cheapest settings; tests only read them."""
    folder = tmp_path_factory.mktemp("swept")
    first = shutil.copytree(untied_run, folder / "first")
    second = write_run(folder / "second", small_benchmark, tied=True)
    for run in (first, second):
        sweep(run, ablations=("zero",), probe="none", event_drift=False)
    return first, second


@pytest.fixture
def swept_run(swept_runs, tmp_path):
    """A copy of the first, for the test to change."""
    return shutil.copytree(swept_runs[0], tmp_path / "run")
