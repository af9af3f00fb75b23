"""Checkpoints written while training goes on: in order, few at a time, and with errors that stop the training."""

from __future__ import annotations

import errno
import functools
import threading
from pathlib import Path

import pytest
import torch

from kvjax.commands.main import main
from kvjax.errors import InputError
from kvjax.pipeline.background_writer import BackgroundWriter
from tests.helpers.building import read_lines
from tests.helpers.training import small_train_config

SECONDS = 30  # until a test that hangs fails


def test_order_of_jobs():
    """Jobs are done in order in another thread, and all are done at the end of the context."""
    gate, done = threading.Event(), []
    with BackgroundWriter(pending=5) as writer:
        writer.submit(functools.partial(gate.wait, SECONDS))
        for number in range(4):
            writer.submit(functools.partial(lambda n: done.append((n, threading.get_ident())), number))
        assert not done, "the caller goes on while the first job waits"
        gate.set()
    assert [number for number, _ in done] == [0, 1, 2, 3]
    assert {thread for _, thread in done}.isdisjoint({threading.get_ident()})


def test_jobs_that_may_be_pending():
    """A job beyond the pending ones is taken only when one of them is done."""
    gate, taken = threading.Event(), threading.Event()
    with BackgroundWriter(pending=2) as writer:

        def give():
            for _ in range(3):
                writer.submit(functools.partial(gate.wait, SECONDS))
            taken.set()

        giver = threading.Thread(target=give)
        giver.start()
        assert not taken.wait(0.3)
        gate.set()
        assert taken.wait(SECONDS)
        giver.join()


@pytest.mark.parametrize("late", [False, True], ids=["while jobs come", "at the end"])
def test_job_that_fails(late):
    """The error of a job reaches the thread that gives jobs, and no later job is begun."""
    gate, done = threading.Event(), []

    def fail():
        gate.wait(SECONDS)
        raise InputError("x.pt: expected a file that can be written; found No space left on device")

    with pytest.raises(InputError, match="No space left"), BackgroundWriter(pending=3) as writer:
        writer.submit(fail)
        writer.submit(lambda: done.append(1))
        gate.set()
        if not late:
            for _ in range(3):
                writer.submit(lambda: done.append(2))
    assert not done


def test_interruption_of_the_writer():
    """An interruption waits for pending jobs: what they hold is whole."""
    done = []
    with pytest.raises(KeyboardInterrupt), BackgroundWriter(pending=3) as writer:
        writer.submit(functools.partial(done.append, 1))
        writer.submit(functools.partial(done.append, 2))
        raise KeyboardInterrupt
    assert done == [1, 2]


def test_torch_threads_of_the_writer():
    """PyTorch has one thread in the writer's thread, and as many as before elsewhere."""
    before, inside = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        with BackgroundWriter(pending=1) as writer:
            writer.submit(lambda: inside.append(torch.get_num_threads()))
        assert inside == [1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_training_on_a_full_disk(tmp_path, small_benchmark, monkeypatch, capsys):
    """A disk that is full at the second checkpoint ends a training with one line and status 2; the first one stays."""
    write = Path.write_bytes

    def full_from_step_16(path, content):
        if "step_000016" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full_from_step_16)
    config = small_train_config(small_benchmark, num_steps=80)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    run = tmp_path / "run"
    assert main(["train", f"--config={tmp_path / 'config.json'}", f"--output_dir={run}", "--noprogress"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "step_000016.pt: expected a file that can be written; found" in error and "No space left" in error
    assert sorted(path.name for path in (run / "checkpoints").glob("*step*")) == ["step_000008.pt"]
    assert not (run / "summary.json").exists()
    assert max(row["step"] for row in read_lines(run / "metrics.jsonl")) < 80, "training stops before its end"
