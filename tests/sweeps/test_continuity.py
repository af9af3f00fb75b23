"""Checkpoints that cannot be neighbours in one run: copies, jumps to another run, resumed training."""

import functools
import itertools
import json
import shutil

import numpy as np
import pytest

from kvjax.artifacts.run_dir import RunDir
from kvjax.pipeline.sweep_state import checkpoints_are_measured
from kvjax.sweeps.continuity import copies, jumps, resumptions
from tests.helpers.building import read_lines
from tests.helpers.sweeping import sweep


def pairs(breaks):
    return [(found.before, found.after) for found in breaks]


def drifts(embeddings):
    """1 - cosine of each embedding with the one before, NaN for the first."""
    unit = [np.asarray(x) / np.linalg.norm(x) for x in embeddings]
    return np.array([np.nan, *(1 - a @ b for a, b in itertools.pairwise(unit))])


@functools.cache
def trained(*, seed, initial=1.0, rate=1e-3, warm_up=1):
    """Embeddings of a run by step: random initial values, then steps of one size in a direction that turns slowly."""
    rng = np.random.default_rng(seed)
    value, direction = initial * rng.standard_normal(500), rng.standard_normal(500)
    found, wanted = {0: value}, set().union(*SCHEDULES.values())
    for step in range(1, max(wanted) + 1):
        direction = 0.999 * direction + 0.045 * rng.standard_normal(500)
        value = value * (1 - 1e-5) + rate * min(1.0, step / warm_up) * direction / np.sqrt(np.mean(direction**2))
        if step in wanted:
            found[step] = value
    return found


LOG = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
SCHEDULES = {
    "log": LOG,
    "log then even": (*LOG, *range(2000, 8001, 1000)),
    "even": tuple(range(0, 8001, 500)),
    "from the middle": tuple(range(4000, 8001, 500)),
    "sparse": (0, 1000, 8000),
    "dense then sparse": (0, 1, 2, 4, 8, 4000, 8000),
    "two": (1000, 8000),
}


@pytest.mark.parametrize("initial", [1.0, 0.02])
@pytest.mark.parametrize("warm_up", [1, 2000])
@pytest.mark.parametrize("steps", SCHEDULES.values(), ids=SCHEDULES)
def test_sound_runs(steps, initial, warm_up):
    """A run has no jump: with early fast turns of small embeddings, warm-up, and few or many checkpoints."""
    found = trained(seed=1, initial=initial, warm_up=warm_up)
    for end in range(2, len(steps) + 1):  # also while it grows
        assert jumps(steps[:end], drifts(found[step] for step in steps[:end])) == []


@pytest.mark.parametrize("at", [16, 512, 3000])
@pytest.mark.parametrize("initial", [1.0, 0.02])
def test_splice_of_two_runs(at, initial):
    """Checkpoints of another seed from some step on are found at that step, and nowhere else."""
    steps = SCHEDULES["log then even"]
    one, other = (trained(seed=seed, initial=initial) for seed in (1, 2))
    mixed = [(one if step < at else other)[step] for step in steps]
    (found,) = jumps(steps, drifts(mixed))
    assert found.after == at and "as those of two runs are" in found.reason and found.kind == "jump"


def test_checkpoint_of_another_run():
    """A single foreign checkpoint is unrelated to both its neighbours."""
    steps = SCHEDULES["even"]
    one, other = (trained(seed=seed) for seed in (1, 2))
    mixed = [(other if step == 2000 else one)[step] for step in steps]
    assert pairs(jumps(steps, drifts(mixed))) == [(1500, 2000), (2000, 2500)]


def test_copies():
    """A copy of any earlier checkpoint is found; a single update without effect, at a learning rate of 0, is none."""
    digests = np.zeros((6, 32), np.uint8)
    digests[:, 31] = [1, 1, 2, 3, 2, 4]
    found = copies((0, 1, 100, 200, 300, 400), digests)
    assert pairs(found) == [(100, 300)] and "steps 100 and 300 have the same parameters" in found[0].reason


def test_resumptions():
    """The interval after the last checkpoint at or before a resumed step is found once; a resumed end has none."""
    found = resumptions((100, 200, 300), [150, 200, 100, 300])
    assert pairs(found) == [(100, 200), (200, 300)]


def edit(path, **changed):
    """Replaces arrays of a stored result by what functions make of it."""
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    np.savez(path, **arrays | {name: change(arrays) for name, change in changed.items()})


def test_breaks_of_a_sweep(swept, tmp_path):
    """Rows, `sweep.json` and `status` name every break, and the sweep notes it."""
    run = shutil.copytree(swept, tmp_path / "run")
    measured = run / "analysis" / "measured"
    with np.load(measured / "step_000100.npz") as first:
        digest = first["weights/digest"]
    edit(measured / "step_000200.npz", **{"weights/digest": lambda _: digest})
    with (run / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"phase": "resume", "step": 200}) + "\n")
    report = sweep(run)
    assert report.log.measured == []
    copy, resumed = "steps 100 and 200 have the same parameters", "training was resumed from step 200"
    rows = read_lines(run / "analysis" / "checkpoint_metrics.jsonl")
    assert [row["trajectory_breaks"] for row in rows] == [[], [copy], [resumed]]
    breaks = json.loads((run / "analysis" / "sweep.json").read_text())["breaks"]
    assert [(b["kind"], b["before"], b["after"], b["reason"]) for b in breaks] == [
        ("copy", 100, 200, copy),
        ("resumed", 200, 300, resumed),
    ]
    assert {copy, resumed} <= set(report.notes)
    state = checkpoints_are_measured(RunDir.open(run))
    assert state.holds and copy in state.reason and resumed in state.reason


def test_sweep_of_a_sound_run(swept):
    """A run without breaks has none in any file."""
    rows = read_lines(swept / "analysis" / "checkpoint_metrics.jsonl")
    assert all(row["trajectory_breaks"] == [] for row in rows)
    assert json.loads((swept / "analysis" / "sweep.json").read_text())["breaks"] == []
