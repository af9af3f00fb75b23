"""The labelled arrays: read as they were written, and one line for what cannot be written or read."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import xarray as xr

from kvjax.artifacts.tables import datasets_file, read_dataset, write_datasets
from kvjax.errors import InputError

DATASET = xr.Dataset(
    {
        "margin": (("step", "split"), np.array([[1.5, np.nan], [2.0, -1.0]]), {"units": "logits"}),
        "is_read": (("step",), np.array([True, False])),
    },
    coords={"step": [250, 500], "split": ["all", "heldout_pairs"]},
    attrs={"run_name": "a run"},
)


def test_groups(tmp_path):
    """Groups of a netCDF file are read as they were written."""
    path = tmp_path / "arrays.nc"
    events = DATASET.rename(margin="margins")
    write_datasets(path, [(None, DATASET), ("events", events)])
    xr.testing.assert_identical(read_dataset(path, expected="arrays"), DATASET)
    xr.testing.assert_identical(read_dataset(path, group="events", expected="arrays"), events)


def test_parts(tmp_path):
    """What is appended in parts is one file, of which any places may be read between two parts, and groups likewise."""
    path, later = tmp_path / "arrays.nc", DATASET.assign_coords(step=[750, 1000])
    whole = xr.concat([DATASET, later], "step", join="exact", combine_attrs="identical")
    with datasets_file(path, along="step", parts=2) as file:
        file.append([(None, DATASET), ("events", DATASET)])
        for found in file.read(1, 2, None, "events"):
            xr.testing.assert_identical(found, DATASET.isel(step=[1]))
        file.append([(None, later), ("events", later)])
        for found in file.read(1, 4, None, "events"):
            xr.testing.assert_identical(found, whole.isel(step=slice(1, 4)))
    for group in (None, "events"):
        xr.testing.assert_identical(read_dataset(path, group=group, expected="arrays"), whole)


@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "group"])
def test_unreadable_file(tmp_path, damage):
    """A file that cannot be read is refused in one line."""
    path = tmp_path / "arrays.nc"
    if damage != "absent":
        write_datasets(path, [(None, DATASET)])
        content = path.read_bytes()
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "group": content}[damage])
    with pytest.raises(InputError, match=r"arrays.nc: expected a sweep's arrays; found") as error:
        read_dataset(path, group="events" if damage == "group" else None, expected="a sweep's arrays")
    assert "\n" not in str(error.value)


def test_full_disk(tmp_path):
    """A full disk is an error of one line, and leaves the earlier file."""
    path = tmp_path / "arrays.nc"
    write_datasets(path, [(None, DATASET)])
    before = path.read_bytes()
    code = """
import resource, signal, sys
from pathlib import Path
import numpy as np, xarray as xr
from kvjax.artifacts.tables import write_datasets
from kvjax.errors import InputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
noise = xr.Dataset({"noise": (("n",), np.random.default_rng(0).normal(size=100_000))})
try:
    write_datasets(Path(sys.argv[1]), [(None, noise)])
except InputError as error:
    print(error)
"""
    (scratch := tmp_path / "scratch").mkdir()
    environment = os.environ | {"TMPDIR": str(scratch)}
    arguments = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment)
    by_way_of = f"by way of {scratch} (TMPDIR names another folder)"
    assert done.stdout == f"{path}: expected a file that can be written {by_way_of}; found File too large\n"
    assert path.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [path, scratch] and not list(scratch.iterdir())


def test_dimension_that_sel_cannot_choose_along(tmp_path):
    """A dimension named as an argument of xarray's `sel` is a mistake of ours, and is never written."""
    with pytest.raises(AssertionError, match="method"):
        write_datasets(tmp_path / "a.nc", [(None, xr.Dataset({"score": ("method", [1.0])}))])


def test_file_system_without_locks(tmp_path, monkeypatch):
    """Tables are written and read where the lock that HDF5 takes on a file cannot be had.

    A lock that somebody else holds stands for that: HDF5 refuses a file in both cases, as the first lines show.
    """
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "local"))
    (tmp_path / "local").mkdir()
    path, partial = tmp_path / "arrays.nc", tmp_path / "partial"
    partial.touch()
    with partial.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(PermissionError):
            DATASET.to_netcdf(partial, engine="netcdf4")
        write_datasets(path, [(None, DATASET)], replace=lambda target: contextlib.nullcontext(partial))
    partial.rename(path)
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="HDF error"):
            xr.open_dataset(path, engine="netcdf4")
        xr.testing.assert_identical(read_dataset(path, expected="arrays"), DATASET)
    assert not list((tmp_path / "local").iterdir())


@pytest.mark.parametrize("room", ["none", "no folder"])
def test_no_room_for_temporary_files(tmp_path, monkeypatch, room):
    """netCDF is written beside its file if the folder of temporary files has no room, or there is none."""
    local = tmp_path / "local"
    monkeypatch.setattr(tempfile, "tempdir", str(local))
    if room == "none":
        local.mkdir()
        usage = shutil.disk_usage(local)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    path = tmp_path / "results" / "arrays.nc"
    write_datasets(path, [(None, DATASET)])
    xr.testing.assert_identical(read_dataset(path, expected="arrays"), DATASET)
    assert list(path.parent.iterdir()) == [path]
