"""Runs of other settings in one program: each has the numbers it has alone, and what cannot share one is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvjax.task.benchmark import Benchmark
from kvjax.train.loop import Training, shared_settings
from tests.helpers.building import SMALL_MODEL
from tests.helpers.commands import optimised_environment
from tests.helpers.training import SGD, small_train_config
from tests.helpers.training_together import PROGRAMS, runs_that_differ

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found(small_benchmark, tmp_path_factory):
    """Every program of the helper, trained in a process that compiles as it does for people."""
    output = tmp_path_factory.mktemp("together") / "found.json"
    command = [sys.executable, "-m", "tests.helpers.training_together", str(small_benchmark), str(output)]
    subprocess.run(command, check=True, cwd=ROOT, env=optimised_environment())
    return json.loads(output.read_text())


@pytest.mark.parametrize("members", [one for one in PROGRAMS if len(one) > 1], ids=str)
def test_bits_of_a_run(found, members):
    """A run has the same bits alone and beside others, whether devices share the runs or each batch."""
    together = found[str(list(members))]
    assert together["programs"] == 1, "one program, whatever differs"
    assert (together["devices"], together["shared"]) == (2, "batch" if len(members) == 3 else "runs")
    for one in (0, 3):
        position, alone = members.index(one), found[str([one])]
        assert alone["shared"] == "batch"
        assert together["rows"][position] == alone["rows"][0]
        assert together["digests"][position] == alone["digests"][0]


def test_settings_take_effect(found):
    """No two of the runs end alike: what differs reaches the program."""
    assert len(set(found["[0, 1, 2, 3]"]["digests"])) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"num_steps": 13},
        {"batch_size": 12},
        {"model": SMALL_MODEL | {"n_heads": 1}},
        {"benchmark_dir": "elsewhere"},
        {"optimization": SGD},
    ],
    ids=["steps", "batch", "heads", "data", "optimizer"],
)
def test_settings_that_part_runs(small_benchmark, change):
    """Runs of other shapes, steps, data or optimizers have other shared settings, and no training takes both."""
    config = runs_that_differ(small_benchmark)[0]
    other = small_train_config(small_benchmark, **({"num_steps": 12} | change))
    assert shared_settings(config) != shared_settings(other)
    with pytest.raises(ValueError, match="expected runs that differ in seed, optimization, init_scale and curriculum"):
        Training([config, other], Benchmark.open(small_benchmark))


def test_settings_that_part_runs_of_sgd(small_benchmark):
    """Rates, decay and momentum differ within a program of SGD; Nesterov's look ahead is another program."""
    changes = ({}, {"learning_rate": 0.5, "momentum": 0.0, "weight_decay": 0.5}, {"nesterov": True})
    plain, other, ahead = (small_train_config(small_benchmark, optimization=SGD | one) for one in changes)
    assert shared_settings(plain) == shared_settings(other) != shared_settings(ahead)
