"""Inputs that runs share: what is opened or made once must be what each run would get by itself."""

import pytest

from kvjax.artifacts.layout import ProbeSetLayout
from kvjax.execution.inputs import OpenedInputs
from kvjax.task.benchmark import Benchmark
from kvjax.task.probe_set import generate_probe_set, own_probe_set


def files(path):
    names = ProbeSetLayout(path)
    return {file.name: file.read_bytes() for file in (path, names.fit, names.sources, names.manifest)}


def test_probe_sets_of_runs_on_one_benchmark(small_benchmark, tmp_path, monkeypatch):
    """The set is chosen once; every run gets the bytes that it would get alone."""
    benchmark = Benchmark.open(small_benchmark)
    alone = own_probe_set(tmp_path / "alone/probe_set.jsonl", benchmark)
    opened = OpenedInputs()
    first = opened.own_probe_set(tmp_path / "first/probe_set.jsonl", benchmark)
    monkeypatch.setattr(Benchmark, "read_split", lambda *_: pytest.fail("the set was chosen again"))
    second = opened.own_probe_set(tmp_path / "second/probe_set.jsonl", benchmark)
    assert files(first.path) == files(second.path) == files(alone.path)
    assert (second.manifest, second.records) == (alone.manifest, alone.records)


def test_probe_set_that_a_run_has_is_kept(small_benchmark, tmp_path):
    """A run's own choice is neither replaced nor handed to other runs."""
    benchmark = Benchmark.open(small_benchmark)
    own = generate_probe_set(benchmark, tmp_path / "own/probe_set.jsonl", examples_per_split=4, fit_examples=8, seed=3)
    opened = OpenedInputs()
    assert opened.own_probe_set(own.path, benchmark).manifest == own.manifest
    other = opened.own_probe_set(tmp_path / "other/probe_set.jsonl", benchmark)
    assert other.manifest == own_probe_set(tmp_path / "alone/probe_set.jsonl", benchmark).manifest != own.manifest
    assert opened.own_probe_set(own.path, benchmark).manifest == own.manifest
