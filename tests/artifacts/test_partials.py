"""Partial files: living writers keep theirs, the next command removes those of killed ones."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from kvjax.artifacts import partials
from kvjax.artifacts.files import FileHash, replace_directory, replace_file, replace_together
from kvjax.artifacts.partials import partial_folder, put_folder_in_place, remove_abandoned
from kvjax.commands.main import main
from tests.helpers.building import small_benchmark_config
from tests.helpers.commands import refused
from tests.helpers.training import small_train_config

_WRITING = """
import sys
from pathlib import Path
from kvjax.artifacts.files import replace_directory, replace_file
replace = {"file": replace_file, "directory": replace_directory}[sys.argv[1]]
with replace(Path(sys.argv[2])) as partial:
    (partial / "a" if partial.is_dir() else partial).write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer(tmp_path):
    """Starts processes that write the file `result`, or a directory, until they are killed."""
    started = []

    def start(kind):
        arguments = [sys.executable, "-c", _WRITING, kind, str(tmp_path / "result")]
        process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "writing\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def forget(monkeypatch):
    """Makes this process one that has written nothing yet."""
    monkeypatch.setattr(partials, "_looked_through", set())


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_killed_writer(tmp_path, writer, forget, kind):
    """The next write into the folder removes what a killed process left, and nothing of a living one."""
    killed, living = writer(kind), writer(kind)
    at_work = {path.name for path in tmp_path.iterdir()}
    assert len(at_work) == (2 if kind == "file" else 4)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    with replace_file(tmp_path / "other") as partial:
        partial.write_text("x")
    left = {path.name for path in tmp_path.iterdir()} - {"other"}
    assert left < at_work and len(left) == len(at_work) // 2
    living.communicate("")  # it ends its block
    assert {path.name for path in tmp_path.iterdir()} == {"other", "result"}


def test_files_of_others(tmp_path):
    """Hidden files that only look alike stay, and so does everything else in the folder."""
    names = [".notes.markdown", ".result.abcd1234", "result.abcd1234.kvjax-partial", ".x.toolong12.kvjax-partial", "a"]
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".result.abcd1234.kvjax-partial").write_text("half")
    remove_abandoned(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names)


def test_folder_that_is_still_written(tmp_path, monkeypatch):
    """Threads that write on for a moment after one of them failed leave no folder behind."""
    late = iter(["a", "", "", "b"])

    def write_meanwhile(seconds):
        if name := next(late, None):
            folder.mkdir()
            (folder / name).touch()

    monkeypatch.setattr(partials.time, "sleep", write_meanwhile)
    with pytest.raises(ValueError), partial_folder(tmp_path / "result") as folder:
        raise ValueError
    assert not list(late) and os.listdir(tmp_path) == []


def test_folder_that_was_read(tmp_path, monkeypatch):
    """A folder that nothing went wrong with is removed at once: some are for scratch files of each run."""
    monkeypatch.setattr(partials.time, "sleep", lambda seconds: pytest.fail("waited"))
    with partial_folder(tmp_path / "result") as folder:
        (folder / "scratch").touch()
    assert os.listdir(tmp_path) == []


def test_folder_without_owner(tmp_path, forget):
    """What threads wrote of a folder after its owner was removed goes with the next write; that of an owner stays."""
    with partial_folder(tmp_path / "result") as folder:
        (tmp_path / ".result.abcdefgh.kvjax-partial.new").mkdir()
        (tmp_path / ".other.new").mkdir()
        remove_abandoned(tmp_path)
        kept = {folder.name, folder.name.removesuffix(".new"), ".other.new"}
        assert set(os.listdir(tmp_path)) == kept


def test_file_system_without_locks(tmp_path, monkeypatch, forget):
    """Without locks files are written all the same, and what is not a day old counts as somebody's."""

    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    young, old = (tmp_path / f".result.{name}.kvjax-partial" for name in ("abcdefgh", "ijklmnop"))
    for path in (young, old):
        path.write_text("half")
    os.utime(old, (0, 0))
    with replace_file(tmp_path / "result") as partial:
        partial.write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"result", young.name}


def test_partial_file_removed_before_it_was_locked(tmp_path, monkeypatch, forget):
    """A writer whose new file another process took for abandoned makes a second one."""
    real, taken = fcntl.flock, []

    def lock_late(descriptor, operation):
        if not taken:
            (found,) = tmp_path.iterdir()
            taken.append(found.name)
            found.unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    with replace_file(tmp_path / "result") as partial:
        assert partial.name not in taken
        partial.write_text("whole")
    assert (tmp_path / "result").read_text() == "whole"


def test_killed_between_two_renamings(tmp_path):
    """A directory that was moved aside for a new one, which never came, is put back."""
    target = tmp_path / "result"
    target.mkdir()
    (target / "a").write_text("earlier")
    owner = tmp_path / ".result.abcd1234.kvjax-partial"
    owner.touch()
    target.rename(tmp_path / f"{owner.name}.old")
    (tmp_path / f"{owner.name}.new").mkdir()
    remove_abandoned(tmp_path)
    assert list(tmp_path.iterdir()) == [target] and (target / "a").read_text() == "earlier"


def test_directory_that_cannot_be_renamed(tmp_path, monkeypatch):
    """The earlier directory stands in its place again if the new one cannot be put there."""
    target = tmp_path / "result"
    target.mkdir()
    (target / "a").write_text("earlier")
    with pytest.raises(FileNotFoundError), partial_folder(target) as folder:
        folder.rmdir()
        put_folder_in_place(folder, target)
    assert list(tmp_path.iterdir()) == [target] and (target / "a").read_text() == "earlier"


def test_files_that_belong_together(tmp_path):
    """None is replaced before all are written; an error in the last leaves every earlier one."""
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_text("earlier")
    with pytest.raises(ZeroDivisionError), replace_together() as files:
        for path in paths[:2]:
            with files.file(path) as partial:
                partial.write_text("later")
        with files.file(paths[2]):
            raise ZeroDivisionError
    assert sorted(tmp_path.iterdir()) == paths and {path.read_text() for path in paths} == {"earlier"}
    with replace_together() as files:
        for path in paths:
            with files.file(path) as partial:
                partial.write_text(f"later {path.name}")
        assert {path.read_text() for path in paths} == {"earlier"}
        hashed = files.hash(paths[0])
    assert [path.read_text() for path in paths] == ["later a", "later b", "later c"]
    assert hashed == FileHash.of(paths[0]) and sorted(tmp_path.iterdir()) == paths


def test_order_on_the_disk(tmp_path, monkeypatch):
    """Contents reach the disk before names, and the names of all others before the last."""
    log, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (log.append(os.readlink(f"/proc/self/fd/{file}")), real(file)))
    monkeypatch.setattr(
        type(tmp_path), "replace", lambda self, to, real=os.replace: (log.append(f"-> {to.name}"), real(self, to))
    )
    first, last = tmp_path / "tables" / "a", tmp_path / "b"
    with replace_together() as files:
        for path in (first, last):
            with files.file(path) as partial:
                partial.write_text("x")
    contents, rest = log[:2], log[2:]
    assert all(".kvjax-partial" in name for name in contents)
    assert rest == ["-> a", str(first.parent), "-> b", str(tmp_path)]


def test_many_threads(tmp_path, forget):
    """Threads that write into one folder for the first time do not take each other's files for abandoned."""
    errors = []

    def write(number):
        try:
            with replace_file(tmp_path / f"{number}") as partial:
                partial.write_text(str(number))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        str(number): str(number) for number in range(40)
    }


def test_permissions(tmp_path):
    """What is written can be read by those whom the umask lets, like any other file."""
    with replace_file(tmp_path / "a") as partial:
        partial.write_text("x")
    with replace_directory(tmp_path / "b") as partial:
        (partial / "c").write_text("x")
    (tmp_path / "plain").write_text("x")
    (tmp_path / "folder").mkdir()
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes["a"] == modes["plain"] and modes["b"] == modes["folder"]


def test_commands_that_write_elsewhere(tmp_path, small_run, small_benchmark, forget, capsys):
    """What a killed command left is removed by the next of its kind, also where that one writes nothing.

    A training, a drawing of a benchmark or a conversion that was killed after its folder stood in its place leaves the
    file whose lock stood for the folder.
    """
    places = [small_run / "analysis" / "converted", small_run / "analysis" / "interventions" / "neurons", tmp_path]
    owners = [place / f".{name}.abcd1234.kvjax-partial" for place, name in zip(places, "abc", strict=True)]
    for owner in owners:
        owner.parent.mkdir(parents=True, exist_ok=True)
        owner.touch()
    assert main(["evaluate", f"--run_dirs={small_run}", "--splits=test_iid", "--noprogress"]) == 0
    assert [owner.exists() for owner in owners] == [False, False, True]
    taken = tmp_path / "drawn"
    shutil.copytree(small_benchmark, taken)
    config = tmp_path / "benchmark.json"
    config.write_text(json.dumps(small_benchmark_config()))
    assert "a directory to create" in refused(
        capsys, "generate-benchmark", f"--config={config}", f"--output_dir={taken}"
    )
    assert not owners[2].exists()


def test_training_killed_after_its_folder_was_put_in_place(tmp_path, small_benchmark, forget):
    """The hidden file beside the run directory goes, whether the training begins anew or goes on."""
    config, run = tmp_path / "train.json", tmp_path / "run"
    config.write_text(small_train_config(small_benchmark, num_steps=8).model_dump_json())
    owner = tmp_path / ".run.abcd1234.kvjax-partial"
    for flags in ([], ["--overwrite"], ["--resume"]):
        owner.touch()
        assert main(["train", f"--config={config}", f"--output_dir={run}", "--noprogress", *flags]) == 0
        assert not owner.exists(), flags
