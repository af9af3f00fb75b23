"""The reader of results: what a sweep wrote, verified byte by byte before any library parses it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import xarray as xr

import kvjax
from kvjax.artifacts import results as results_module
from kvjax.artifacts.birth_windows_schema import write_birth_windows
from kvjax.artifacts.files import FileHash
from kvjax.artifacts.identity import sealed
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.sweep_schema import read_sweep, write_sweep
from kvjax.artifacts.tables import write_datasets
from kvjax.errors import InputError
from kvjax.pipeline.windows import windows_are_current
from tests.helpers.building import STEPS, read_lines
from tests.helpers.sweeping import sweep

TABLES = {
    "metrics": "checkpoint_metrics.nc",
    "intervals": "checkpoint_metrics.nc",
    "events": "checkpoint_metrics.nc",
    "rows": "checkpoint_metrics.jsonl",
    "heads": "component_candidates/heads.jsonl",
    "mlps": "component_candidates/mlps.jsonl",
}


def write_intervention(run, *, kind="path_patching", window="steps_100", value=1.5):
    """Writes an intervention's two files as docs/formats.md describes them."""
    path = run / "analysis" / "interventions" / kind / f"{window}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_datasets(path.with_suffix(".nc"), [(None, xr.Dataset({"recovery": ("step", [value])}, {"step": [100]}))])
    arrays = FileHash.of(path.with_suffix(".nc"))
    summary = {
        "kind": kind,
        "steps": [100],
        "measured_on": {"settings": {}, "inputs": {}},
        "arrays": {"sha256": arrays.sha256, "bytes": arrays.bytes},
    }
    path.write_text(json.dumps(sealed(summary)))
    return path


def flipped(path, other):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def truncated(path, other):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path, other):
    path.write_bytes(b"")


def empty_object(path, other):
    path.write_text("{}")


def of_another_run(path, other):
    shutil.copyfile(other, path)


def missing(path, other):
    path.unlink()


DAMAGE = [flipped, truncated, empty, empty_object, of_another_run, missing]


def test_what_a_sweep_wrote(swept_runs):
    """The datasets and rows are those of the files, and each is read once."""
    run = swept_runs[0]
    results = kvjax.open_results(run)
    path = run / "analysis" / "checkpoint_metrics.nc"
    for group, found in ((None, results.metrics), ("intervals", results.intervals), ("events", results.events)):
        with xr.open_dataset(path, group=group, engine="netcdf4") as dataset:
            xr.testing.assert_identical(found, dataset.load())
    assert results.rows == read_lines(run / "analysis" / "checkpoint_metrics.jsonl")
    assert [row["step"] for row in results.rows] == list(STEPS)
    assert results.heads == read_lines(run / "analysis" / "component_candidates" / "heads.jsonl")
    assert results.mlps == read_lines(run / "analysis" / "component_candidates" / "mlps.jsonl")
    assert [checkpoint.step for checkpoint in results.sweep.checkpoints] == list(STEPS)
    assert results.sweep.benchmark.name and set(results.sweep.tables) == set(TABLES.values())
    assert results.metrics is results.metrics and results.rows is results.rows


def test_tree_of_all_arrays(swept_run):
    """One tree holds every group as it is, with the interventions by kind and window."""
    write_intervention(swept_run)
    write_intervention(swept_run, kind="necessity", window="window_200", value=2.5)
    results = kvjax.open_results(swept_run)
    tree = results.tree
    for name in ("metrics", "intervals", "events"):
        xr.testing.assert_identical(tree[name].to_dataset(), getattr(results, name))
    assert tree["interventions/necessity/window_200"]["recovery"].values.tolist() == [2.5]
    assert tree.attrs == {"run_name": "small_run", "seed": 5}
    assert [(found.kind, found.window) for found in results.interventions()] == [
        ("necessity", "window_200"),
        ("path_patching", "steps_100"),
    ]
    assert [found.window for found in results.interventions("path_patching")] == ["steps_100"]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", TABLES)
def test_damaged_table(swept_runs, swept_run, monkeypatch, name, damage):
    """A table that is not the sweep's is refused in one line with the remedy, before a library opens it."""
    path = swept_run / "analysis" / TABLES[name]
    damage(path, swept_runs[1] / "analysis" / TABLES[name])

    def opened(*args, **kwargs):
        raise AssertionError("a damaged file was parsed")

    monkeypatch.setattr(results_module, "read_dataset", opened)
    monkeypatch.setattr(results_module, "read_json_lines", opened)
    with pytest.raises(InputError) as refused:
        getattr(kvjax.open_results(swept_run), name)
    line = str(refused.value)
    assert line.startswith(f"{path}: expected the ") and "\n" not in line
    assert f"(run kvjax checkpoint-sweep --run_dirs={swept_run} again); found" in line


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_arrays_of_an_intervention(swept_run, damage):
    """Arrays that are not the summary's are refused in one line that names both files."""
    path = write_intervention(swept_run).with_suffix(".nc")
    damage(path, write_intervention(swept_run, window="steps_200", value=2.5).with_suffix(".nc"))
    found = next(kvjax.open_results(swept_run).interventions("path_patching"))
    with pytest.raises(InputError, match=r"steps_100.nc: expected .* that steps_100.json records .*kvjax intervene"):
        _ = found.dataset


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_provenance(swept_runs, swept_run, damage):
    """A damaged `sweep.json` is one line; one that parses but is another run's fits none of the tables."""
    path = swept_run / "analysis" / "sweep.json"
    damage(path, swept_runs[1] / "analysis" / "sweep.json")
    with pytest.raises(InputError) as refused:
        _ = kvjax.open_results(swept_run).metrics
    assert "run kvjax checkpoint-sweep" in str(refused.value) or "a JSON file" in str(refused.value)


def test_sweep_of_an_older_version(swept_run):
    """A sweep without hashes is refused with the command that adds them, and this measures nothing again."""
    path = swept_run / "analysis" / "sweep.json"
    document = json.loads(path.read_text())
    del document["tables"], document["converted"], document["content_sha256"]
    path.write_text(json.dumps(document))
    results = kvjax.open_results(swept_run)
    assert len(results.sweep.checkpoints) == len(STEPS)
    with pytest.raises(
        InputError, match=r"sweep.json: expected the hash of checkpoint_metrics.nc \(run kvjax checkpoint-s"
    ):
        _ = results.metrics
    before = xr.load_dataset(swept_run / "analysis" / "checkpoint_metrics.nc", engine="netcdf4")
    assert sweep(swept_run, ablations=("zero",), probe="none", event_drift=False).log.measured == []
    xr.testing.assert_identical(kvjax.open_results(swept_run).metrics, before)


@pytest.mark.parametrize("content", ["", "{}", "[]", "{", "null", '{"identity": 3}'])
def test_sweep_again_over_damaged_provenance(swept_run, content):
    """The command that an error names works: nothing is measured again, and the results can be read."""
    (swept_run / "analysis" / "sweep.json").write_text(content)
    assert sweep(swept_run, ablations=("zero",), probe="none", event_drift=False).log.measured == []
    assert np.isfinite(kvjax.open_results(swept_run).metrics["answer_accuracy"]).all()


def edited(path, **changes):
    """Changes fields of a JSON file, as by an editor."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_edited_provenance(swept_run):
    """A `sweep.json` of which one word was changed is refused with the command that writes it again."""
    path = swept_run / "analysis" / "sweep.json"
    edited(path, precision="default")
    expected = r"sweep.json: expected the content that its own hash names \(run kvjax checkpoint-sweep again\)"
    with pytest.raises(InputError, match=expected):
        _ = kvjax.open_results(swept_run).metrics


def no_windows(measured_on):
    """Returns the document of a run in which nothing formed."""
    found = {"verdict": "no transition", "reason": "no shift", "complete": True, "births": {}, "windows": []}
    of_run = {"schema_version": 1, "run_name": "small_run", "measured_on": measured_on, "config": {}, "breaks": []}
    return of_run | found


def test_windows_of_another_sweep(swept_run):
    """Windows are of exactly the sweep they were found in: its settings, checkpoints and numbers, not its timings."""
    run = RunDir.open(swept_run)
    sweep = read_sweep(run.layout.sweep)
    write_birth_windows(run.layout.birth_windows, no_windows(sweep.measured_on.model_dump()))
    assert windows_are_current(run).holds and kvjax.open_results(swept_run).windows.verdict == "no transition"
    write_sweep(run.layout.sweep, sweep.model_copy(update={"timings": {}, "notes": ["another"], "device": {}}))
    assert windows_are_current(run).holds
    rows = "checkpoint_metrics.jsonl"
    for change in (
        {"identity": sweep.identity | {"probe": "ridge"}},
        {"identity": sweep.identity | {"ablations": ["zero", "mean"]}},
        {"checkpoints": [sweep.checkpoints[0].model_copy(update={"sha256": "0" * 64}), *sweep.checkpoints[1:]]},
        {"tables": sweep.tables | {rows: FileHash("0" * 64, sweep.tables[rows].bytes)}},
    ):
        write_sweep(run.layout.sweep, sweep.model_copy(update=change))
        state = windows_are_current(run)
        assert not state.holds and state.reason == "the sweep has changed since windows were looked for", change
        with pytest.raises(InputError, match="found those of a sweep that has changed since"):
            _ = kvjax.open_results(swept_run).windows


def test_edited_windows(swept_run):
    """A `birth_windows.json` that was edited is refused with the command that writes it again."""
    run = RunDir.open(swept_run)
    measured_on = read_sweep(run.layout.sweep).measured_on.model_dump()
    write_birth_windows(run.layout.birth_windows, no_windows(measured_on))
    edited(run.layout.birth_windows, verdict="windows")
    state = windows_are_current(run)
    assert not state.holds and "the content that its own hash names (run kvjax birth-windows again)" in state.reason
    assert state.command == f"kvjax birth-windows --run_dirs={swept_run}"


@pytest.mark.parametrize("document", [[], {}, {"kind": "neurons"}])
def test_odd_summary_of_an_intervention(swept_run, document):
    """A summary without what this version writes is one line."""
    write_intervention(swept_run).write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"steps_100.json: expected the summary of an intervention"):
        list(kvjax.open_results(swept_run).interventions())


def test_summary_without_a_hash(swept_run):
    """A summary whose own hash is gone, even under a damaged name, is refused: nothing could tell what else changed."""
    path = write_intervention(swept_run)
    path.write_text(path.read_text().replace("content_sha256", "fontent_sha256"))
    with pytest.raises(InputError, match=r"steps_100.json: expected the hash of its own content .*kvjax intervene"):
        list(kvjax.open_results(swept_run).interventions())
