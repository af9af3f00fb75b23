"""One complete sweep of a small run, and what PyTorch says of it, for all tests of the sweep's files."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.helpers.building import SMALL_MODEL, STEPS, read_lines
from tests.helpers.sweeping import sweep
from tests.oracles.pytorch_loops import load_module, measure


@pytest.fixture(scope="session")
def swept(tmp_path_factory, untied_run):
    """A swept run directory; tests only read it."""
    run = shutil.copytree(untied_run, tmp_path_factory.mktemp("swept") / "run")
    sweep(run)
    return run


@pytest.fixture(scope="session")
def rows(swept):
    return {row["step"]: row for row in read_lines(swept / "analysis" / "checkpoint_metrics.jsonl")}


@pytest.fixture(scope="session")
def truth(swept, small_benchmark):
    """step -> what the oracle measures."""
    vocabulary = json.loads((small_benchmark / "metadata.json").read_text())["vocabulary"]
    records, fit = (read_lines(swept / "analysis" / f"probe_set{part}.jsonl") for part in ("", ".fit"))
    return {
        step: measure(
            load_module(swept / "checkpoints" / f"step_{step:06d}.pt", SMALL_MODEL, len(vocabulary["tokens"])),
            records,
            vocabulary,
            fit=fit,
        )
        for step in STEPS
    }
