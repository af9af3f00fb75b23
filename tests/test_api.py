"""The Python interface: what `import kvjax` offers, and the script of the docs."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import kvjax
from kvjax.errors import InputError
from tests.helpers.building import STEPS
from tests.helpers.sweeping import sweep

ROOT = Path(__file__).resolve().parents[1]


def test_sweep(small_run):
    """`kvjax.sweep` returns what the files hold, with units and intervals, and measures nothing again."""
    report = sweep(small_run)

    def written():
        files = (small_run / "analysis" / "measured").iterdir()
        return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}

    before = written()
    dataset = kvjax.sweep(small_run, probe_set=small_run / "analysis" / "probe_set.jsonl")
    assert len(before) >= len(STEPS) and written() == before, "nothing was measured again"
    assert dataset.equals(dataset.assign(report.dataset.data_vars))
    on_disk = xr.open_dataset(small_run / "analysis" / "checkpoint_metrics.nc", engine="netcdf4")
    assert on_disk["answer_accuracy"].equals(dataset["answer_accuracy"])
    for name, variable in dataset.data_vars.items():
        assert {"units", "long_name"} <= variable.attrs.keys(), name
    accuracy = dataset.sel(split="all")
    assert (accuracy["answer_accuracy_low"] <= accuracy["answer_accuracy"]).all()
    assert (accuracy["answer_accuracy"] <= accuracy["answer_accuracy_high"]).all()


def test_several_runs(small_run, tmp_path):
    """Several runs lie along a dimension, NaN wherever a run lacks a step."""
    sweep(small_run)
    shorter = shutil.copytree(small_run, tmp_path / "shorter")
    (shorter / "checkpoints" / "step_000300.pt").unlink()
    both = kvjax.sweep([small_run, shorter])
    assert both["answer_accuracy"].dims[0] == "run" and both.sizes["run"] == 2
    assert np.isnan(both["answer_accuracy"].isel(run=1).sel(step=300)).all()
    assert both["seed"].values.tolist() == [5, 5] and len(set(both["run"].values.tolist())) == 2
    assert both["answer_accuracy"].isel(run=0).sel(step=300).notnull().all()


def test_plotting_script(small_run, tmp_path):
    """The script of the docs draws a figure, without kvjax or an accelerator."""
    sweep(small_run)
    target = tmp_path / "figure.png"
    script = [sys.executable, ROOT / "docs" / "plot_trajectories.py", small_run / "analysis" / "checkpoint_metrics.nc"]
    subprocess.run([*script, target], check=True, env={"MPLBACKEND": "agg", "PATH": "", "HOME": str(tmp_path)})
    assert target.read_bytes().startswith(b"\x89PNG")


def test_no_usable_checkpoint(small_run):
    """A run without any usable checkpoint is refused."""
    for path in (small_run / "checkpoints").glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="expected a run with a usable checkpoint; found none"):
        kvjax.sweep(small_run, skip_bad=True)
