"""The Python interface: what `import kvjax` offers, and the script of the docs."""

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import kvjax
from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import InputError, Note
from kvjax.pipeline.settings import RunsOnBenchmark, SweepInputs
from kvjax.pipeline.sweep import sweep as sweep_stage
from kvjax.sweeps.settings import SweepSettings
from kvjax.task.benchmark import Benchmark
from kvjax.task.probe_set import generate_probe_set
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


@pytest.fixture
def swept(monkeypatch):
    """Lets `kvjax.sweep` return datasets made by hand, run by run; gets what it was asked for."""
    asked = {}

    def use(**datasets):
        def stage(runs, inputs, settings, *, results, mixed):
            asked.update(runs=runs, mixed=mixed)
            none = xr.Dataset()
            return [
                types.SimpleNamespace(run=types.SimpleNamespace(path=name), dataset=dataset, intervals=none)
                for name, dataset in datasets.items()
            ]

        monkeypatch.setattr("kvjax.api.sweep_stage", stage)
        return asked

    return use


def measured(name, steps, seed=1, probe="p"):
    """Returns a run's dataset whose accuracy is its step."""
    attrs = {"run_name": name, "seed": seed, "benchmark_sha256": "b", "probe_set_sha256": probe}
    return xr.Dataset({"accuracy": ("step", np.array(steps, float))}, {"step": list(steps)}, attrs)


def test_runs_with_other_steps(swept):
    """Steps that one run lacks are NaN with a note that names them, cut off, or refused, as asked."""
    swept(a=measured("a", (100, 200, 300)), b=measured("b", (100, 300, 400), seed=2))
    with pytest.warns(Note) as notes:
        outer = kvjax.sweep(["a", "b"])
    assert outer["step"].values.tolist() == [100, 200, 300, 400]
    np.testing.assert_array_equal(outer["accuracy"], [[100, 200, 300, np.nan], [100, np.nan, 300, 400]])
    assert [str(one.message) for one in notes] == [
        "a lacks step 400, which other runs have: NaN in the joined result",
        "b lacks step 200, which other runs have: NaN in the joined result",
    ]
    inner = kvjax.sweep(["a", "b"], join="inner")
    np.testing.assert_array_equal(inner["accuracy"], [[100, 300], [100, 300]])
    with pytest.raises(InputError, match=r"a: expected the steps of the other runs .*; found no step 400"):
        kvjax.sweep(["a", "b"], join="exact")
    swept(a=measured("a", (100,)), b=measured("b", (200,)))
    with pytest.raises(InputError, match="join: expected a step that all runs have"):
        kvjax.sweep(["a", "b"], join="inner")


def test_coordinates_of_several_runs(swept):
    """Each run has its seed and the hashes of what it was measured on; one without a usable checkpoint is named."""
    swept(a=measured("a", (100,), seed=7, probe="p"), b=measured("b", (100,), seed=8, probe="q"), c=None)
    with pytest.warns(Note, match="c: left out"):
        both = kvjax.sweep(["a", "b", "c"], mixed="join", join="exact")
    assert both["run"].values.tolist() == ["a", "b"] and both["seed"].values.tolist() == [7, 8]
    assert both["probe_set_sha256"].values.tolist() == ["p", "q"]
    assert both["benchmark_sha256"].values.tolist() == ["b", "b"]


@pytest.mark.parametrize(("parameter", "value"), [("mixed", "yes"), ("join", "left")])
def test_unknown_choice(swept, parameter, value):
    """A choice that does not exist is refused before anything is measured."""
    assert not swept()
    with pytest.raises(InputError, match=f"{parameter}: expected one of .*; found {value}"):
        kvjax.sweep(["a", "b"], **{parameter: value})


def test_runs_on_other_probe_sets(small_run, small_benchmark, tmp_path, monkeypatch):
    """Runs with other probe sets or benchmarks are refused before anything is measured, or joined with a note."""
    other = shutil.copytree(small_run, tmp_path / "other")
    for run, seed in ((small_run, 1), (other, 2)):
        generate_probe_set(
            Benchmark.open(small_benchmark),
            RunDir.open(run).layout.probe_set,
            examples_per_split=4,
            fit_examples=8,
            seed=seed,
        )
    swept = []
    monkeypatch.setattr("kvjax.pipeline.sweep.sweep_runs", lambda prepared, *a, **k: swept.append(len(prepared)) or [])
    runs, expected = RunsOnBenchmark.of([small_run, other]), rf"other: expected the probe set of {small_run}, \w{{12}} "
    with pytest.raises(InputError, match=expected):
        sweep_stage(runs, SweepInputs(), SweepSettings(), mixed="refuse")
    with pytest.warns(Note, match=rf"other: measured on another probe set than {small_run}"):
        sweep_stage(runs, SweepInputs(), SweepSettings(), mixed="join")
    one = SweepInputs(probe_set=str(RunDir.open(small_run).layout.probe_set))
    sweep_stage(runs, one, SweepSettings(), mixed="refuse")
    sweep_stage(runs, SweepInputs(), SweepSettings())
    assert swept == [2, 2, 2]
    moved = shutil.copytree(small_benchmark, tmp_path / "benchmark")
    (moved / "metadata.json").write_text((moved / "metadata.json").read_text() + " ")
    config = json.loads((other / "run_config.json").read_text())
    (other / "run_config.json").write_text(json.dumps(config | {"benchmark_dir": str(moved)}))
    shutil.rmtree(other / "analysis")
    with pytest.raises(InputError, match=rf"other: expected the benchmark of {small_run}, \w{{12}} "):
        sweep_stage(runs, SweepInputs(), SweepSettings(), mixed="refuse")
