"""The labelled arrays: read as they were written, and one line for what cannot be written or read."""

import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

from kvjax.artifacts.tables import read_dataset, write_datasets
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
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{path}: expected a file that can be written; found ")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_dimension_that_sel_cannot_choose_along(tmp_path):
    """A dimension named as an argument of xarray's `sel` is a mistake of ours, and is never written."""
    with pytest.raises(AssertionError, match="method"):
        write_datasets(tmp_path / "a.nc", [(None, xr.Dataset({"score": ("method", [1.0])}))])
