"""Several runs in one sweep: what they share, and what one that fails leaves of the others."""

import json
import math
import shutil

import jax
import numpy as np
import pytest

from kvjax.errors import InputError
from kvjax.execution import inputs
from kvjax.sweeps.run import sweep_runs
from kvjax.sweeps.settings import SweepSettings
from tests.helpers.building import SMALL_MODEL, STEPS, read_lines, write_run
from tests.helpers.sweeping import prepared_run, source
from tests.oracles.pytorch_loops import load_module, mean, measure


def test_tied_and_untied_runs(tmp_path, small_benchmark, small_run, rows):
    """Tied and untied runs share a sweep, each with its own numbers."""
    tied = write_run(tmp_path / "tied", small_benchmark, tied=True)
    both = [prepared_run(run) for run in (tied, small_run)]
    # Fewer measures than `rows` has: tied models are compiled for this test alone, and answers depend on none of them.
    settings = SweepSettings(ablations=("zero",), probe="none")
    reports = sweep_runs(both, source, settings=settings, advance=lambda n: None)
    assert [row["answer_accuracy"] for row in reports[1].rows] == [rows[step]["answer_accuracy"] for step in STEPS]
    vocabulary = json.loads((small_benchmark / "metadata.json").read_text())["vocabulary"]
    module = load_module(tied / "checkpoints" / "step_000100.pt", SMALL_MODEL, len(vocabulary["tokens"]))
    truth = measure(module, read_lines(tied / "analysis" / "probe_set.jsonl"), vocabulary)
    margin = mean([read["margin"] for read in truth["reads"]])
    assert math.isclose(reports[0].rows[0]["answer_margin"], margin, rel_tol=1e-4, abs_tol=1e-5)


def test_run_without_usable_checkpoint(tmp_path, small_run):
    """A run without a usable checkpoint does not stop the others."""
    broken = shutil.copytree(small_run, tmp_path / "broken")
    for file in (broken / "checkpoints").glob("step_*.pt"):
        file.write_bytes(b"")
    work = [prepared_run(run) for run in (broken, small_run)]
    reports = sweep_runs(work, source, settings=SweepSettings(skip_bad=True), advance=lambda n: None)
    assert [len(report.rows) for report in reports] == [0, len(STEPS)]
    assert len(reports[0].log.refused) == len(STEPS)


def test_tables_before_a_failing_run(tmp_path, small_run):
    """A run that stops the sweep leaves the tables of the one before."""
    broken = shutil.copytree(small_run, tmp_path / "broken")
    (broken / "checkpoints" / "step_000200.pt").write_bytes(b"")
    work = [prepared_run(run) for run in (small_run, broken)]
    with pytest.raises(InputError, match=r"broken/checkpoints/step_000200.pt"):
        sweep_runs(work, source, settings=SweepSettings(ablations=("zero",), probe="none"), advance=lambda n: None)
    assert len(read_lines(small_run / "analysis" / "checkpoint_metrics.jsonl")) == len(STEPS)
    assert (small_run / "analysis" / "sweep.json").is_file()
    assert not (broken / "analysis" / "sweep.json").exists()


def test_error_order_across_runs(tmp_path, small_run, monkeypatch):
    """If writing a run fails, that error comes before the error of a later run."""
    broken = shutil.copytree(small_run, tmp_path / "broken")
    (broken / "checkpoints" / "step_000200.pt").write_bytes(b"")
    work = [prepared_run(run) for run in (small_run, broken)]

    def full_disk(*measured):
        raise InputError("checkpoint_metrics.nc: expected a file that can be written; found a full disk")

    monkeypatch.setattr("kvjax.sweeps.tables.publish", full_disk)
    with pytest.raises(InputError, match="full disk"):
        sweep_runs(work, source, settings=SweepSettings(ablations=("zero",), probe="none"), advance=lambda n: None)


def test_shared_inputs(tmp_path, small_run, monkeypatch):
    """Inputs that runs share are opened and encoded once."""
    own = prepared_run(small_run)
    given = str(small_run / "analysis" / "probe_set.jsonl")
    encoded = []
    encode = inputs.encode_records
    monkeypatch.setattr(inputs, "encode_records", lambda *a, **k: encoded.append(k) or encode(*a, **k))
    opened = inputs.OpenedInputs()
    runs = [small_run, shutil.copytree(small_run, tmp_path / "other")]
    first, second = (prepared_run(run, probe_set=given, opened=opened) for run in runs)
    assert len(encoded) == 2  # the probe records and the fit set
    assert first.encoded is second.encoded and first.probe is second.probe
    jax.tree.map(np.testing.assert_array_equal, (second.encoded, second.fit), (own.encoded, own.fit))
