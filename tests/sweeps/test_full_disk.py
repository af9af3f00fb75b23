"""A disk that fills up at any write of a sweep: one line, what was measured stays, and the next sweep goes on."""

import errno
import os
import re
import shutil
from pathlib import Path

import pytest

from kvjax.artifacts import partials
from kvjax.artifacts.results import RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import InputError
from tests.helpers.sweeping import SMALL_SWEEP, sweep

LITTLE = {"ablations": SMALL_SWEEP.ablations, "probe": SMALL_SWEEP.probe, "checkpoint_batch": "1"}


class FullDisk:
    """Counts the files and folders that a run's sweep makes to write to, and lets one of them find no room.

    Such a file is /dev/full, which takes no byte; such a folder cannot be made.
    """

    def __init__(self, monkeypatch, run):
        self.writes, self.full_at = [], None
        make, mkdir = partials._make_locked, Path.mkdir

        def make_locked(target):
            descriptor, path = make(target)
            if target.is_relative_to(run) or target.name.startswith("kvjax_"):
                self.writes.append(target.name)
                if len(self.writes) == self.full_at:
                    path.unlink()
                    path.symlink_to("/dev/full")
            return descriptor, path

        def make_folder(path, *how, **more):
            if path.with_suffix("").is_symlink():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            mkdir(path, *how, **more)

        monkeypatch.setattr(partials, "_make_locked", make_locked)
        monkeypatch.setattr(Path, "mkdir", make_folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, untied_run):
    """The rows of a sweep that nothing disturbs."""
    run = shutil.copytree(untied_run, tmp_path_factory.mktemp("undisturbed") / "run")
    return sweep(run, **LITTLE).rows


def test_every_write(small_run, monkeypatch, undisturbed):
    """Sweeps one after another, each of which finds the disk full one write later than the one before."""
    disk, refused, measured = FullDisk(monkeypatch, small_run), set(), 0
    for disk.full_at in range(1, 100):
        disk.writes.clear()
        try:
            report = sweep(small_run, **LITTLE)
        except InputError as error:
            assert re.fullmatch(
                rf"{small_run}/analysis/\S+: expected a file .*; found No space left on device", str(error)
            )
            refused.add(str(error).partition(":")[0].rpartition("/")[2])
            found = len(list((small_run / "analysis" / "measured").glob("step_*.npz")))
            assert found >= measured
            measured = found
            continue
        if len(disk.writes) < disk.full_at:
            break
        # Parameters that cannot be stored are converted again another time, and the tables say so.
        assert "No space left on device" in report.log.not_kept
    assert report.rows == undisturbed and report.log.not_kept is None
    print("REFUSED", sorted(refused))
    assert {"probe_set.jsonl", "values_step_000300.npz"} <= refused
    # Which write of a comparison finds the disk full depends on the threads; here it is the first of them.
    movements = list((small_run / "analysis").rglob("movement_*.npz"))
    assert len(movements) >= 4
    for path in movements:
        path.unlink()
    os.utime(small_run / "analysis" / "measured" / "step_000100.npz")  # so that tables are drawn again
    disk.writes.clear()
    disk.full_at = 1
    with pytest.raises(
        InputError, match=r"/movement_step_\d+_\w+\.npz: expected a file .*; found No space left on device"
    ):
        sweep(small_run, **LITTLE)
    disk.writes.clear()
    disk.full_at = None
    assert sweep(small_run, **LITTLE).rows == undisturbed


def test_tables_that_find_no_room(small_run, monkeypatch, undisturbed):
    """Whichever table finds no room: the earlier ones are all there, and fit each other."""
    sweep(small_run, **LITTLE)
    os.utime(small_run / "analysis" / "measured" / "step_000100.npz")  # so that tables are drawn again
    before = {path: path.read_bytes() for path in (small_run / "analysis").rglob("*") if path.is_file()}
    disk = FullDisk(monkeypatch, small_run)
    for disk.full_at in range(1, 100):
        disk.writes.clear()
        try:
            sweep(small_run, **LITTLE)
        except InputError as error:
            assert "No space left on device" in str(error) and disk.writes[disk.full_at - 1].removeprefix(
                "kvjax_"
            ) in str(error)
        else:
            break
        assert {path: path.read_bytes() for path in (small_run / "analysis").rglob("*") if path.is_file()} == before
    assert sorted(disk.writes) == sorted(
        [
            *("checkpoint_metrics.nc", "kvjax_checkpoint_metrics.nc"),
            *("checkpoint_metrics.jsonl", "heads.jsonl", "mlps.jsonl", "sweep.json"),
        ]
    )
    assert RunResults(RunDir.open(small_run)).rows == undisturbed
