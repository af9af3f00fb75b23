"""A disk that is full, or cannot be written, at any write of any command: one line, status 2, and nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil

import pytest

from kvjax.artifacts.layout import RunLayout
from kvjax.commands.main import main
from tests.helpers.building import SMALL_MODEL, small_benchmark_config, write_run
from tests.helpers.full_disk import FullFiles, disk_below, first_of_each
from tests.helpers.training import small_train_config

RUN, BENCHMARK, PROBE_SET = "run", "benchmark", "probe_set.jsonl"
PATCHING = ("--steps=300", "--force", "--pairs_per_kind=2", "--kinds=neurons,activation_patching", "--noprogress")


def _compared(folder):
    return f"--run_dirs={folder}/one,{folder}/other"


def _going_on(folder):
    """Goes on as a person would: from the checkpoints there are, or anew."""
    layout = RunLayout(folder / "trained")
    return ["--resume"] if layout.step_checkpoints() else ["--overwrite"] if layout.config.is_file() else []


COMMANDS = {
    "generate-benchmark": lambda f: [f"--config={f}/benchmark.json", f"--output_dir={f}/new"],
    "generate-probe-set": lambda f: [
        *(f"--benchmark_dir={f}/{BENCHMARK}", f"--output={f}/new/{PROBE_SET}", "--examples_per_split=20")
    ],
    "train": lambda f: [f"--config={f}/train.json", f"--output_dir={f}/trained", "--noprogress", *_going_on(f)],
    "convert": lambda f: [f"--run_dirs={f}/{RUN}", "--noprogress"],
    "evaluate": lambda f: [f"--run_dirs={f}/{RUN}", "--splits=test_iid", "--noprogress"],
    "select-reference": lambda f: [f"--run_dirs={f}/{RUN}", f"--output={f}/new/ranking.json", "--noprogress"],
    "checkpoint-sweep": lambda f: [f"--run_dirs={f}/{RUN}", "--ablations=zero", "--probe=none", "--noprogress"],
    "birth-windows": lambda f: [f"--run_dirs={f}/one", "--noprogress"],
    "intervene": lambda f: [f"--run_dirs={f}/one", *PATCHING],
    "compare-seeds": lambda f: [_compared(f), f"--output_dir={f}/new", "--null_draws=20"],
    "report": lambda f: [
        _compared(f),
        f"--output={f}/new/report.html",
        f"--figures_dir={f}/new/figures",
        "--noprogress",
    ],
    "pipeline": lambda f: [f"--run_dirs={f}/{RUN}", f"--output_dir={f}/study", "--pairs_per_kind=2", "--noprogress"],
}
FAULTS = {"no room": errno.ENOSPC, "read-only": errno.EROFS, "over quota": errno.EDQUOT}


@pytest.fixture(scope="module")
def material(tmp_path_factory, small_benchmark):
    """Configs, a benchmark, a run without results, and two runs with a sweep and windows; tests copy the folder."""
    folder = tmp_path_factory.mktemp("material") / "work"
    shutil.copytree(small_benchmark, folder / BENCHMARK)
    (folder / "benchmark.json").write_text(json.dumps(small_benchmark_config()))
    train = small_train_config(folder / BENCHMARK, num_steps=16, model=SMALL_MODEL | {"n_layers": 1, "n_heads": 2})
    (folder / "train.json").write_text(train.model_dump_json())
    write_run(folder / RUN, small_benchmark)
    sweep = ("--ablations=zero", "--probe=none", "--noprogress")
    for name in ("one", "other"):
        shutil.copytree(folder / RUN, folder / name)
    assert main(["checkpoint-sweep", f"--run_dirs={folder}/one,{folder}/other", *sweep]) == 0
    assert main(["birth-windows", f"--run_dirs={folder}/one,{folder}/other", "--noprogress"]) == 0
    return folder


@pytest.fixture
def folder(material, tmp_path):
    return shutil.copytree(material, tmp_path / "work")


def contents(folder):
    """Reads every file but the locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and "lock" not in path.name)
    return {path: path.read_bytes() for path in files}


def call(name, folder):
    """Runs a command; returns its status and what stands on standard error, without notes."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = main([name, *COMMANDS[name](folder)])
    return status, [line for line in errors.getvalue().splitlines() if ": note: " not in line]


def check_refusal(status, lines, folder, before, fault):
    """Checks that a command refused in one line that gives the reason, and that every earlier file is as it was."""
    assert status == 2 and len(lines) == 1 and os.strerror(fault) in lines[0], lines
    assert str(folder) in lines[0] and ": expected " in lines[0], lines
    now = contents(folder)
    assert [path for path in before if now.get(path) != before[path]] == []
    assert [path for path in now if "kvjax-partial" in path.name] == []


def kept(name, folder):
    """Reads the files that a later call must leave as they are.

    A resumed run goes on with its log and its best checkpoint, and the list of converted parameters grows.
    """
    changing = {"metrics.jsonl", "run_config.json", "best_checkpoint.json", "best.pt"} if name == "train" else set()
    converted = {RunLayout(folder / run).converted / "manifest.json" for run in (RUN, "one", "other")}
    earlier = contents(folder).items()
    return {path: content for path, content in earlier if path.name not in changing and path not in converted}


def check_every(name, folder, numbers, attempt, fault=errno.ENOSPC):
    """Calls a command once for each number, with a disk that fails from there on, and then with a sound one.

    Args:
      name, folder: the command and what it works in.
      numbers: of operations or files, ascending.
      attempt: calls with a number; returns status, lines, and the names of what the command was about to make.
      fault: what the system says.
    """
    refused = 0
    for number in numbers:
        before = kept(name, folder)
        status, lines, made = attempt(number)
        if len(made) < number:
            continue  # what an earlier call did is not done again
        if status == 0:  # parameters that cannot be kept are converted again another time
            assert made[number - 1] in ("converted", "manifest.json") or made[number - 1].startswith("part_"), made
            continue
        check_refusal(status, lines, folder, before, fault)
        refused += 1
    assert refused
    status, lines, _ = attempt(None)
    assert status == 0, lines


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", COMMANDS)
def test_every_operation(folder, name, fault):
    """From the first operation on each kind of file on, nothing can be made; on a sound disk all is done then."""
    copy = shutil.copytree(folder, folder.parent / "undisturbed")
    with disk_below(copy) as operations:
        assert call(name, copy)[0] == 0

    def attempt(number):
        with disk_below(folder, fails_from=number, code=FAULTS[fault]) as made:
            return (*call(name, folder), made)

    numbers = first_of_each(operations) if fault == "no room" else [1, len(operations)]
    check_every(name, folder, numbers, attempt, FAULTS[fault])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_file(folder, name, monkeypatch):
    """From the first file of each kind on, files can be made and take no byte."""
    copy = shutil.copytree(folder, folder.parent / "undisturbed")
    disk = FullFiles(monkeypatch, folder.parent)
    assert call(name, copy)[0] == 0
    numbers = first_of_each(disk.writes)

    def attempt(number):
        disk.writes, disk.full_from = [], number
        return (*call(name, folder), disk.writes)

    check_every(name, folder, numbers, attempt)
