"""Tables drawn in blocks of checkpoints: equal to those drawn at once, in memory that does not grow with the run."""

import gc
import os
import shutil
import tracemalloc

import numpy as np
import pytest
import xarray as xr

from kvjax.artifacts.checkpoint_sums import CheckpointResult
from kvjax.artifacts.files import write_json_lines
from kvjax.artifacts.layout import step_name
from kvjax.artifacts.results import RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.stored_rows import StoredRows
from kvjax.artifacts.sweep_schema import read_sweep
from kvjax.errors import InputError
from kvjax.sweeps import blocks, intervals, tables
from kvjax.sweeps.fixed_margin import NO_COMPETITOR, FixedMargins
from kvjax.sweeps.results import MeasuredRun, SweepLog
from kvjax.sweeps.settings import SweepSettings
from tests.helpers.building import STEPS
from tests.helpers.sweeping import prepared_run, sweep


def test_spans(monkeypatch):
    """Every checkpoint is new in exactly one block; every block but the first begins with the one before."""
    monkeypatch.setattr(blocks, "BLOCK", 3)
    assert blocks.spans(7) == [(0, 3, 0), (2, 6, 1), (5, 7, 1)]
    assert blocks.spans(3) == [(0, 3, 0)]
    for count in range(1, 12):
        new = [place for begin, end, before in blocks.spans(count) for place in range(begin + before, end)]
        assert new == list(range(count))


@pytest.mark.parametrize("logistic", [(), (STEPS[1],)])
def test_equal_tables(swept, tmp_path, monkeypatch, logistic):
    """In blocks of two checkpoints every mean is the same to the last bit, also if one alone has logistic probes."""
    whole, parts = (shutil.copytree(swept, tmp_path / name / "run") for name in ("whole", "parts"))
    for run, size in ((whole, 128), (parts, 2)):
        monkeypatch.setattr(blocks, "BLOCK", size)
        how = {"probe": "logistic", "steps": list(logistic), "reference": str(STEPS[-1])} if logistic else {}
        assert sweep(run, **how).log.measured == []
    before, now = (RunResults(RunDir.open(run)) for run in (whole, parts))
    for path in (before.run.layout.rows, before.run.layout.heads, before.run.layout.mlps):
        assert path.read_bytes() == (parts / path.relative_to(whole)).read_bytes()
    for group in ("metrics", "intervals", "events"):
        theirs, ours = getattr(before, group), getattr(now, group)
        if group == "intervals":  # products over resamples round by their size, in float64
            xr.testing.assert_allclose(theirs, ours, rtol=1e-12, atol=1e-12)
            theirs, ours = (x.sel(statistic="estimate") for x in (theirs, ours))
        assert theirs.identical(ours), group
        assert [x.dtype for x in theirs.variables.values()] == [x.dtype for x in ours.variables.values()]
    assert bool(logistic) == ("logistic_probe_accuracy" in now.metrics)


def test_memory_of_tables(swept, tmp_path, monkeypatch):
    """A run of four times the checkpoints takes no more memory, but for its provenance."""
    monkeypatch.setattr(blocks, "BLOCK", 8)
    # Which splits' resamples are held together is then the same in every call; among threads it is their timing.
    monkeypatch.setattr(intervals, "available_cores", lambda: 1)
    run = shutil.copytree(swept, tmp_path / "run")
    with np.load(run / "analysis" / "measured" / f"{step_name(STEPS[0])}.npz") as stored:
        sums = {name: stored[name] for name in stored.files if name != "info"}
    inputs = prepared_run(run)
    settings = SweepSettings(ablations=("zero",), probe="none")

    def largest(count: int) -> int:
        steps = range(1, count + 1)
        found = [(step_name(step), CheckpointResult(step, {}, _provenance(step))) for step in steps]
        of_reads = np.zeros(inputs.encoded.is_read.shape, np.float32)
        margins = FixedMargins(np.full(of_reads.shape, NO_COMPETITOR, np.int32), lambda named: of_reads)
        copies = lambda named: {name: values.copy() for name, values in sums.items()}  # noqa: E731
        measured = MeasuredRun(found, None, lambda named: {}, None, [], margins, copies)
        gc.collect()
        tracemalloc.start()
        try:
            report = tables.publish(inputs, {}, measured, settings, SweepLog())
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert [row["step"] for row in report.rows] == list(steps)
        return peak

    largest(8)  # imports and caches
    few, many = largest(16), largest(64)
    of_one = sum(values.nbytes for values in sums.values())
    assert many - few < 48 * 0.25 * of_one, (few, many, of_one)


def _provenance(step: int) -> dict:
    return {"file": f"{step_name(step)}.pt", "sha256": f"{step:064x}", "fingerprint": f"{step:064x}", "notes": []}


def test_stored_rows(tmp_path):
    """Rows are read when they are asked for, and refused once the table was written again."""
    path = tmp_path / "rows.jsonl"
    truth = [{"step": step, "text": "é" * step} for step in range(5)]
    write_json_lines(path, truth)
    rows = StoredRows(path)
    assert (len(rows), list(rows), rows[1:4], rows[-1]) == (5, truth, truth[1:4], truth[-1])
    with pytest.raises(IndexError):
        rows[5]
    write_json_lines(path, truth)
    for read in (list, lambda rows: rows[0]):
        with pytest.raises(InputError, match=r"rows\.jsonl: .* written again since"):
            read(rows)


def test_current_tables(swept, tmp_path):
    """Tables that nothing they are drawn from has changed for are left as they are, else drawn again."""
    run = shutil.copytree(swept, tmp_path / "run")
    layout = RunDir.open(run).layout
    sweep(run)  # of another path than the copy's original
    files = (layout.rows, layout.heads, layout.mlps, layout.arrays, layout.sweep)

    def written() -> dict:
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}

    before = written()
    report = sweep(run)
    assert written() == before and (report.log.measured, report.log.reused) == ([], list(STEPS))
    assert report.notes == read_sweep(layout.sweep).notes and [row["step"] for row in report.rows] == list(STEPS)

    def edited_table() -> None:
        layout.heads.write_bytes(layout.heads.read_bytes().replace(b"1", b"2", 1))

    def touched_sums() -> None:
        os.utime(layout.measured / "step_000200.npz")

    def resumed_log() -> None:
        with layout.metrics.open("a") as log:
            log.write('{"phase": "resume", "step": 100}\n')

    for change in (edited_table, touched_sums, resumed_log):
        change()
        before = written()
        assert sweep(run).log.measured == []
        assert all(now != before[path] for path, now in written().items()), change
    assert [row["ranked_by"] for row in sweep(run, rank_by="zero").rows] == ["zero"] * len(STEPS)
