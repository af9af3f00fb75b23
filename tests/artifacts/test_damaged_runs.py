"""`status` and `birth-windows` on runs whose files were damaged after the sweep."""

from __future__ import annotations

import shutil

import pytest

from kvjax.artifacts.run_dir import RunDir
from kvjax.commands.main import main
from kvjax.windows.run import notes_on_changes
from tests.helpers.fuzzing import check_fuzzed
from tests.helpers.sweeping import sweep


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def replace(path, old, new, count):
    content = path.read_text()
    assert content.count(old) >= count
    path.write_text(content.replace(old, new))


# What happens to a run and its twin -> what `status` says of the sweep, and whether another sweep repairs it.
DAMAGE = {
    "arrays cut": (lambda run, twin: cut(run / "analysis/checkpoint_metrics.nc"), "checkpoint_metrics.nc", True),
    "arrays flipped": (lambda run, twin: flip(run / "analysis/checkpoint_metrics.nc"), "checkpoint_metrics.nc", True),
    "no arrays": (lambda run, twin: (run / "analysis/checkpoint_metrics.nc").unlink(), "no such file", True),
    "no rows": (lambda run, twin: (run / "analysis/checkpoint_metrics.jsonl").unlink(), "no such file", True),
    "rows of the twin": (
        lambda run, twin: shutil.copy(twin / "analysis/checkpoint_metrics.jsonl", run / "analysis"),
        "checkpoint_metrics.jsonl",
        True,
    ),
    "no sums": (lambda run, twin: shutil.rmtree(run / "analysis/measured"), "lacks the sums of 3 checkpoints", True),
    "sums cut": (
        lambda run, twin: cut(run / "analysis/measured/step_000200.npz"),
        "sums of 1 checkpoint (steps 200)",
        True,
    ),
    "checkpoint of the twin": (
        lambda run, twin: shutil.copy(twin / "checkpoints/step_000200.pt", run / "checkpoints"),
        "1 checkpoint changed since being measured (steps 200)",
        True,
    ),
    "checkpoint cut": (
        lambda run, twin: cut(run / "checkpoints/step_000200.pt"),
        "1 checkpoint changed since being measured (steps 200)",
        False,
    ),
    "no store": (
        lambda run, twin: shutil.rmtree(run / "analysis/converted"),
        "converted parameters are missing",
        False,
    ),
    "empty sweep.json": (lambda run, twin: (run / "analysis/sweep.json").write_text(""), "sweep.json", True),
    "sweep.json []": (lambda run, twin: (run / "analysis/sweep.json").write_text("[]"), "sweep.json", True),
    "sweep.json null": (lambda run, twin: (run / "analysis/sweep.json").write_text("null"), "sweep.json", True),
    "sweep.json edited": (
        lambda run, twin: replace(run / "analysis/sweep.json", '"precision": "highest"', '"precision": "default"', 2),
        "sweep.json",
        True,
    ),
    "sweep.json with an infinite step": (
        lambda run, twin: replace(run / "analysis/sweep.json", '"step": 200', '"step": Infinity', 1),
        "sweep.json",
        True,
    ),
    "sweep.json {}": (lambda run, twin: (run / "analysis/sweep.json").write_text("{}"), "sweep.json", True),
}


def sweep_condition(run, capsys):
    """Returns the line in which `status` says whether the sweep is complete."""
    capsys.readouterr()
    assert main(["status", f"--run_dirs={run}"]) == 0
    (line,) = [line.strip() for line in capsys.readouterr().out.splitlines() if "sweep complete" in line]
    return line


@pytest.mark.parametrize("name", DAMAGE)
def test_status_of_a_damaged_run(swept_runs, swept_run, capsys, name):
    """A sweep is complete only while every file is as recorded; sweeping again repairs what a sweep writes."""
    damage, reason, repaired = DAMAGE[name]
    assert sweep_condition(swept_run, capsys).startswith("yes  sweep complete")
    damage(swept_run, swept_runs[1])
    line = sweep_condition(swept_run, capsys)
    assert line.startswith("no   sweep complete: ") and reason in line
    if repaired:
        # The twin answers otherwise than this run recorded: that is refused unless a note is asked for.
        sweep(swept_run, ablations=("zero",), probe="none", event_drift=False, contradiction="note")
        assert sweep_condition(swept_run, capsys).startswith("yes  sweep complete")


def test_birth_windows_of_changed_checkpoints(swept_runs, swept_run):
    """Windows that are found after a checkpoint file was replaced are noted to be of the older one."""
    run = RunDir.open(swept_run)
    assert notes_on_changes(run) == []
    DAMAGE["checkpoint of the twin"][0](swept_run, swept_runs[1])
    (note,) = notes_on_changes(run)
    assert note.startswith("1 checkpoint changed since being measured (steps 200): these are windows of the older")


@pytest.mark.parametrize("name", ["arrays cut", "arrays flipped", "no arrays", "empty sweep.json"])
def test_birth_windows_of_a_damaged_run(swept_runs, swept_run, capsys, name):
    """`birth-windows` ends with one line and status 2, without opening the damaged file."""
    DAMAGE[name][0](swept_run, swept_runs[1])
    assert main(["birth-windows", f"--run_dirs={swept_run}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ("checkpoint_metrics.nc" in line and "run kvjax checkpoint-sweep" in line) or "sweep.json" in line


def test_fuzzed_results_of_a_sweep(tmp_path, swept_runs, small_benchmark):
    """Damaged tables, provenance, sums and converted parameters are refused, or made again."""
    names = ["tables", "netCDF of a sweep", "sweep.json", "measured sums", "store's manifest"]
    check_fuzzed(tmp_path, swept_runs[0], small_benchmark, step=300, names=names, inputs=10)
