"""`--follow` on runs that have not begun."""

from __future__ import annotations

import json
import shutil
import types

import pytest

from kvjax.artifacts.find_runs import find_run_dirs
from kvjax.errors import InputError, Note
from kvjax.pipeline import follow as follow_module
from kvjax.pipeline.follow import follow
from kvjax.pipeline.settings import RunsOnBenchmark, SweepInputs
from kvjax.sweeps.results import SweepLog, SweepReport
from kvjax.sweeps.settings import SweepSettings


@pytest.fixture
def rounds(monkeypatch):
    """Sweeps that measure nothing; returns the steps that each round saw, by the run's directory."""
    seen = []

    def sweep(runs, inputs, settings, progress, results, engine, *, still_training, group=None):
        assert results.wait, "another command may be at work between two rounds"
        assert still_training, "the last checkpoint is not the final one yet"
        found = find_run_dirs(runs.run_dirs)
        seen.append({run.path.name: list(run.checkpoints) for run in found})
        return [SweepReport(run, [], SweepLog(), []) for run in found]

    monkeypatch.setattr(follow_module, "sweep_over_runs", sweep)
    return seen


def meanwhile(monkeypatch, *events):
    """Lets one thing happen in each pause between two rounds."""
    left = list(events)
    monkeypatch.setattr(follow_module, "time", types.SimpleNamespace(sleep=lambda seconds: left.pop(0)()))


def followed(*names):
    return list(follow(RunsOnBenchmark(run_dirs=names), SweepInputs(), SweepSettings()))


@pytest.mark.parametrize("name", ["run", "r*"])
def test_run_that_begins_later(untied_run, tmp_path, monkeypatch, rounds, name):
    """A run is waited for before its directory, its config and its first checkpoint exist, and then followed."""
    run = tmp_path / "run"
    meanwhile(
        monkeypatch,
        lambda: run.mkdir(),
        lambda: shutil.copy(untied_run / "run_config.json", run),
        lambda: (run / "checkpoints").mkdir(),
        lambda: shutil.copy(untied_run / "checkpoints/step_000100.pt", run / "checkpoints"),
        lambda: shutil.copy(untied_run / "checkpoints/step_000300.pt", run / "checkpoints"),
    )
    monkeypatch.chdir(tmp_path)
    with pytest.warns(Note, match="waiting for its first checkpoint"):
        assert len(followed(name)) == 2
    assert rounds == [{"run": [100]}, {"run": [100, 300]}]


def test_one_of_two_runs_begins_later(untied_run, tmp_path, monkeypatch, rounds):
    """The first run is swept while the second is waited for, and nothing ends before both are complete."""
    first, second = (shutil.copytree(untied_run, tmp_path / name) for name in ("first", "second"))
    (second / "checkpoints").rename(tmp_path / "later")
    meanwhile(monkeypatch, lambda: None, lambda: (tmp_path / "later").rename(second / "checkpoints"))
    with pytest.warns(Note, match="second: waiting"):
        followed(str(first), str(second))
    complete = [100, 200, 300]
    assert rounds == [{"first": complete}, {"first": complete}, {"first": complete, "second": complete}]


def test_run_that_cannot_be_opened(untied_run, tmp_path, monkeypatch, rounds):
    """A damaged config is refused at once; it is not waited for."""
    run = shutil.copytree(untied_run, tmp_path / "run")
    (run / "run_config.json").write_text(json.dumps({"run_name": 3}))
    with pytest.raises(InputError, match=r"run_config.json"):
        followed(str(run))
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"expected a run directory; found a file"):
        followed(str(tmp_path / "file"))
