"""Locks of run directories: one writer at a time, readers at any time, nothing left by a command that was killed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from kvjax.artifacts.layout import RunLayout
from kvjax.artifacts.run_lock import hold
from kvjax.commands.main import main
from kvjax.errors import InputError, Note
from tests.helpers.commands import refused
from tests.helpers.training import small_train_config

HOLDER = {"pid": 4711, "host": "far", "since": "2026-01-02 03:04:05+00:00", "command": "kvjax checkpoint-sweep"}
WORDS = "process 4711 on far since 2026-01-02 03:04:05+00:00: kvjax checkpoint-sweep"


@contextlib.contextmanager
def held_elsewhere(lock_file, holder=HOLDER):
    """Holds a lock as another process does: by the operating system's call, on a descriptor of its own."""
    lock_file.parent.mkdir(exist_ok=True)
    lock_file.write_text(json.dumps(holder))
    with lock_file.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


WRITERS = {
    "checkpoint-sweep": [],
    "convert": [],
    "evaluate": [],
    "birth-windows": [],
    "intervene": ["--steps=100", "--force"],
}


@pytest.mark.parametrize("command", WRITERS)
def test_second_writer(swept_run, capsys, command):
    """Each command that writes results is refused at once while another writes them, and names that one."""
    with held_elsewhere(RunLayout(swept_run).analysis_lock):
        before = files(swept_run)
        line = refused(capsys, command, f"--run_dirs={swept_run}", *WRITERS[command])
        assert files(swept_run) == before
    assert (
        line == f"kvjax {command}: {swept_run}: expected no other command that writes there (or --wait); found {WORDS}"
    )


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
def test_second_training(small_run, small_benchmark, tmp_path, capsys, flags):
    """A second training of a directory is refused before it reads or changes anything there."""
    config = tmp_path / "train.json"
    config.write_text(small_train_config(small_benchmark).model_dump_json())
    with held_elsewhere(small_run.parent / ".run.lock"):
        before = files(small_run)
        line = refused(capsys, "train", "--noprogress", f"--config={config}", f"--output_dir={small_run}", *flags)
        assert files(small_run) == before
    assert line.endswith(f"{small_run}: expected no other command that writes there; found {WORDS}")


def test_overwriting_a_run_that_is_swept(swept_run, small_benchmark, tmp_path, capsys):
    """Training does not replace a directory while a sweep writes results there."""
    config = tmp_path / "train.json"
    config.write_text(small_train_config(small_benchmark).model_dump_json())
    with held_elsewhere(RunLayout(swept_run).analysis_lock):
        line = refused(
            capsys, "train", "--noprogress", f"--config={config}", f"--output_dir={swept_run}", "--overwrite"
        )
        assert (swept_run / "analysis" / "sweep.json").is_file()
    assert line.endswith(WORDS)


def test_reader_beside_a_writer(swept_run, capsys):
    """`status` reads a run while another command writes it."""
    with held_elsewhere(RunLayout(swept_run).analysis_lock):
        assert main(["status", f"--run_dirs={swept_run}"]) == 0
    assert "yes  sweep complete" in capsys.readouterr().out


def test_waiting_for_a_writer(tmp_path):
    """With `wait`, a writer says for whom it waits, and goes on once that one is done."""
    lock_file = tmp_path / "analysis" / "lock"
    elsewhere = contextlib.ExitStack()
    elsewhere.enter_context(held_elsewhere(lock_file))
    threading.Timer(0.1, elsewhere.close).start()
    began = time.monotonic()
    with pytest.warns(Note, match=f"waiting for {WORDS}".replace("+", r"\+")), hold(lock_file, tmp_path, wait=True):
        assert time.monotonic() - began >= 0.1


def test_holder_that_is_about_to_go(tmp_path):
    """A holder that lets go within a moment, as one that was just killed, refuses nobody."""
    lock_file = tmp_path / "analysis" / "lock"
    elsewhere = contextlib.ExitStack()
    elsewhere.enter_context(held_elsewhere(lock_file))
    threading.Timer(0.1, elsewhere.close).start()
    with hold(lock_file, tmp_path, wait=False):
        assert json.loads(lock_file.read_text())["pid"] == os.getpid()


def test_description_of_the_holder(tmp_path):
    """A lock's file names its holder's process and host, the command and the time."""
    lock_file = tmp_path / "analysis" / "lock"
    with hold(lock_file, tmp_path), hold(lock_file, tmp_path):  # once more by the same thread
        holder = json.loads(lock_file.read_text())
        with lock_file.open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = []
        thread = threading.Thread(target=lambda: found.append(refusal(lock_file, tmp_path)))
        thread.start()
        thread.join()
    assert lock_file.read_bytes() == b"", "a lock that nobody holds names nobody"
    assert holder["pid"] == os.getpid() and holder["host"] == os.uname().nodename
    assert holder["command"] and holder["since"].startswith(time.strftime("%Y-"))
    assert f"found process {os.getpid()} on " in found[0]


def refusal(lock_file, run):
    with pytest.raises(InputError) as refused, hold(lock_file, run):
        pass
    return str(refused.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}'])
def test_holder_that_cannot_be_read(tmp_path, content):
    """A lock is a lock whatever its file says."""
    lock_file = tmp_path / ".lock"
    with held_elsewhere(lock_file):
        lock_file.write_text(content)
        assert refusal(lock_file, tmp_path).endswith("; found another process")


def test_lock_of_a_killed_command(tmp_path):
    """A process that is killed leaves its file, and no lock."""
    lock_file = tmp_path / ".lock"
    code = (
        "import sys, time; from pathlib import Path; from kvjax.artifacts.run_lock import hold\n"
        "with hold(Path(sys.argv[1]), Path('run')): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(lock_file)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        assert f"found process {process.pid} on " in refusal(lock_file, tmp_path)
        process.send_signal(signal.SIGKILL)
    with hold(lock_file, tmp_path):
        assert json.loads(lock_file.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_system_without_locks(tmp_path, monkeypatch, code):
    """Where there are no locks, a command says so and goes on."""

    def no_locks(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    went_on = False
    with pytest.warns(Note, match=f"{tmp_path}: no lock can be had there"), hold(tmp_path / ".lock", tmp_path):
        went_on = True
    assert went_on


def test_folder_that_cannot_be_written(tmp_path):
    """A folder that cannot be made is one line."""
    (tmp_path / "analysis").write_text("a file of that name")
    found = refusal(tmp_path / "analysis" / "lock", tmp_path)
    assert found.startswith(f"{tmp_path}/analysis: expected a folder that can be written (or `output_dir`); found ")


def test_notes_of_commands(capsys, monkeypatch, swept_run):
    """A command prints each note once, as a line on standard error, and goes on."""

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr("kvjax.pipeline.windows.write_windows", lambda run, config: None)
    monkeypatch.setattr("kvjax.pipeline.windows.tell_story", lambda results: None)
    monkeypatch.setattr("kvjax.pipeline.text.print_told_windows", lambda told, show: None)
    assert main(["birth-windows", f"--run_dirs={swept_run}", "--noprogress"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"kvjax birth-windows: note: {swept_run}: no lock can be had there")


@pytest.mark.parametrize(("hard", "outcome"), [(4096, "held 600"), (200, "ulimit -Hn")])
def test_locks_of_many_runs(tmp_path, hard, outcome):
    """More runs than files may be open are locked at once if the limit can be raised; else one line says what to do."""
    code = """
import contextlib, resource, sys
from pathlib import Path
from kvjax.artifacts.run_lock import allow_locks, hold
from kvjax.errors import InputError
resource.setrlimit(resource.RLIMIT_NOFILE, (100, int(sys.argv[2])))
allow_locks(600)
with contextlib.ExitStack() as held:
    try:
        for number in range(600):
            run = Path(sys.argv[1]) / str(number)
            held.enter_context(hold(run / "analysis" / "lock", run, wait=False))
        print("held 600")
    except InputError as error:
        print(error)
"""
    command = [sys.executable, "-c", code, str(tmp_path), str(hard)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and outcome in done.stdout and len(done.stdout.splitlines()) == 1, done.stderr
