"""Sweeps that real processes share over the loopback: the rows of one process, and one line if one of them dies."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import xarray as xr

from kvjax.artifacts.differences import between_arrays, between_documents, largest
from tests.helpers.building import SMALL_MODEL, read_lines, write_run
from tests.helpers.clusters import ONE_DEVICE
from tests.helpers.processes import (
    free_port,
    group_of_processes,
    launched_by_hand,
    launched_by_slurm,
    recording_opened_files,
    sweep_command,
)

STEPS = tuple(range(100, 900, 100))
NAMES = [f"step_{step:06d}" for step in STEPS]


@pytest.fixture(scope="module")
def unswept(tmp_path_factory, small_benchmark):
    """A run of eight checkpoints of one layer; tests copy it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SMALL_MODEL, "n_layers", 1)
        return write_run(tmp_path_factory.mktemp("processes") / "run", small_benchmark, steps=STEPS)


@pytest.fixture(scope="module")
def alone(unswept, tmp_path_factory):
    """The run as one process sweeps it."""
    run = shutil.copytree(unswept, tmp_path_factory.mktemp("alone") / "run")
    done = subprocess.run(sweep_command(run), env=ONE_DEVICE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def run(unswept, tmp_path):
    return shutil.copytree(unswept, tmp_path / "run")


def apart(run, other):
    """Finds the largest relative difference of everything that is drawn of two runs, and of their sums."""
    found = []
    for table in ("checkpoint_metrics.jsonl", "component_candidates/heads.jsonl", "component_candidates/mlps.jsonl"):
        mine, theirs = (read_lines(one / "analysis" / table) for one in (run, other))
        found.append(between_documents(mine, theirs, where=table, floor=1e-3))
    for group in (None, "intervals", "events"):
        arrays = [xr.load_dataset(one / "analysis" / "checkpoint_metrics.nc", group=group) for one in (run, other)]
        mine, theirs = ({str(name): one.values for name, one in dataset.variables.items()} for dataset in arrays)
        found.append(between_arrays(mine, theirs, where=str(group)))
    measured = [one / "analysis" / "measured" for one in (run, other)]
    names = [sorted(path.name for path in folder.iterdir()) for folder in measured]
    assert names[0] == names[1]
    for name in names[0]:
        with np.load(measured[0] / name) as mine, np.load(measured[1] / name) as theirs:
            sums = [{key: one[key] for key in one.files if key != "info"} for one in (mine, theirs)]
        found.append(between_arrays(*sums, where=name))
    return largest(found)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_started_here(run, alone, tmp_path, count):
    """Two and four processes give the rows of one, in order, and each opens its own checkpoints and their neighbours.

    Nothing is measured twice, and a second call measures nothing.
    """
    opened = tmp_path / "opened"
    env = recording_opened_files(opened)
    done = subprocess.run(sweep_command(run, f"--processes={count}"), env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "8 measured, 0 reused, 0 skipped." in done.stdout and done.stdout.count("Results in") == 1
    assert [row["step"] for row in read_lines(run / "analysis" / "checkpoint_metrics.jsonl")] == list(STEPS)
    assert apart(run, alone).size == 0, apart(run, alone)
    of_process = sorted(set(path.read_text().split()) for path in opened.glob("*.txt"))
    size = len(NAMES) // count
    expected = []
    for first in range(0, len(NAMES), size):
        places = {*range(max(0, first - 2), first + size), 0, len(NAMES) - 1}
        expected.append({f"{NAMES[place]}.pt" for place in places})
    assert sorted(map(sorted, of_process)) == sorted(map(sorted, expected))


@pytest.mark.parametrize(("victim", "launched"), [(0, launched_by_slurm), (1, launched_by_hand)])
def test_process_that_is_killed(run, alone, victim, launched):
    """The other process ends in one line within a minute, and a second call of both goes on to the same results."""
    command, other = sweep_command(run), 1 - victim
    own = NAMES[:4] if victim == 0 else NAMES[4:]
    files = [run / "analysis" / "measured" / f"{name}.npz" for name in own]
    with group_of_processes(command, launched(2, free_port())) as processes:
        while not any(file.is_file() for file in files):
            assert all(process.poll() is None for process in processes), processes[other].stderr.read()
            time.sleep(0.005)
        processes[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        assert processes[other].wait(timeout=60) == 2
        assert time.monotonic() - killed < 60
        line = processes[other].stderr.read().strip()
        assert "\n" not in line and f"process {victim} of 2 (" in line, line
        assert "call again: what was measured is reused); found that it ended" in line
        assert processes[other].stdout.read() == ""
    assert not (run / "analysis" / "sweep.json").exists()
    measured = {path.name for path in (run / "analysis" / "measured").glob("step_*.npz")}
    with group_of_processes(command, launched(2, free_port())) as processes:
        outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert f"{8 - len(measured)} measured, {len(measured)} reused" in outputs[0][0] and outputs[1] == ("", "")
    # Once the last digit of a weight norm differed, by 3e-16.
    assert apart(run, alone).size <= 1e-6, apart(run, alone)
