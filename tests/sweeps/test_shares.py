"""Runs measured in shares, as several processes do it: what each reads, and tables like those of one sweep."""

import dataclasses
import fcntl
import itertools
import shutil
from pathlib import Path

import pytest
from kvjax.converters.parameter_store import stored_sha256s

from kvjax.artifacts.files import file_sha256
from kvjax.artifacts.layout import RunLayout
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.stored_rows import StoredRows
from kvjax.errors import InputError
from kvjax.pipeline.settings import RunsOnBenchmark, SweepInputs
from kvjax.pipeline.shared_sweep import Share, ShareWorker
from kvjax.pipeline.sweep import sweep as sweep_stage
from kvjax.sweeps.run import open_results
from kvjax.sweeps.settings import SweepSettings
from kvjax.sweeps.shares import ShareReport, cut_into_shares
from tests.helpers.building import SMALL_MODEL, write_run
from tests.helpers.opened_files import OpenedFiles
from tests.helpers.sweeping import prepared_run, sweep

STEPS = tuple(range(50, 400, 50))
NAMES = [f"step_{step:06d}" for step in STEPS]
LITTLE = {"ablations": ("zero",), "probe": "none"}


class Processes:
    """Measures shares one after another, each as a process of its own does: with nothing but what is handed to it."""

    def __init__(self, number, opened=None):
        self.number, self.shares, self.opened, self._files = number, [], [], opened

    def measure(self, shares, advance):
        reports = []
        for share in shares:
            lock = RunLayout(Path(share.run)).analysis_lock
            with lock.open() as file, pytest.raises(BlockingIOError):  # other commands are kept away
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._files:
                self._files.taken()
            try:
                reports.append(ShareReport.of_json(ShareWorker()(share.as_json(), advance)))
            except InputError as error:
                reports.append(error)
            self.shares.append(share.names)
            if self._files:
                self.opened.append(self._files.taken())
        return reports


@pytest.fixture(scope="module")
def unswept(tmp_path_factory, small_benchmark):
    """A run of seven checkpoints of one layer; tests copy it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SMALL_MODEL, "n_layers", 1)
        return write_run(tmp_path_factory.mktemp("shares") / "run", small_benchmark, steps=STEPS)


@pytest.fixture(scope="module")
def alone(unswept, tmp_path_factory):
    """The report of one sweep of the run."""
    return sweep(shutil.copytree(unswept, tmp_path_factory.mktemp("alone") / "run"), **LITTLE)


@pytest.fixture
def run(unswept, tmp_path):
    return shutil.copytree(unswept, tmp_path / "run")


def swept_by(processes, *runs, advance=lambda n: None, **inputs_and_settings):
    """Sweeps runs in shares, and returns the report of the first."""
    given = LITTLE | inputs_and_settings
    inputs = SweepInputs(**{name: given.pop(name) for name in ("steps", "reference") if name in given})
    runs_on = RunsOnBenchmark.of(runs)
    return sweep_stage(runs_on, inputs, SweepSettings(**given), sharing=processes)[0]


@pytest.mark.parametrize("sizes", [(2, 3, 2), (1,) * 7])
def test_shares_of_a_run(run, alone, sizes):
    """Rows are those of one sweep; each share opens its own files, and those that these are compared with."""
    opened = OpenedFiles()
    processes = Processes(len(sizes), opened)
    opened.taken()
    report = swept_by(processes, run)
    assert list(report.rows) == list(alone.rows)
    assert report.dataset.equals(alone.dataset) and report.intervals.equals(alone.intervals)
    assert tuple(map(len, processes.shares)) == sizes and list(itertools.chain(*processes.shares)) == NAMES
    for names, files in zip(processes.shares, processes.opened, strict=True):
        first = NAMES.index(names[0])
        others = {NAMES[0], NAMES[-1], *NAMES[max(0, first - 2) : first]}  # the first, the reference, the two before
        assert files.keys() == {f"{name}.pt" for name in {*names, *others}}
    assert opened.taken() == {}, "tables need no checkpoint"
    assert report.log.measured == list(STEPS) and report.log.unvouched is None
    stored = stored_sha256s(run / "analysis" / "converted")
    assert stored == {file_sha256(path) for path in RunDir.open(run).checkpoints.values()}
    again = Processes(3)
    assert swept_by(again, run).log.reused == list(STEPS) and again.shares == []


def test_shares_of_what_is_left(run, alone):
    """Shares are equal in what is left to measure; what was measured is reused, and more shares than checkpoints go."""
    sweep(run, steps="50-200", reference="200", **LITTLE)
    work = prepared_run(run)
    _, store = open_results(work, SweepSettings(**LITTLE))
    assert cut_into_shares(work, store, 2, anew=False) == [tuple(NAMES[:5]), tuple(NAMES[5:])]
    assert cut_into_shares(work, store, 2, anew=True) == [tuple(NAMES[:3]), tuple(NAMES[3:])]
    report = swept_by(Processes(20), run)
    assert list(report.rows) == list(alone.rows)
    assert (report.log.measured, report.log.reused) == ([250, 300, 350], [50, 100, 150, 200])


@pytest.mark.parametrize("reference", ["best", "200"])
def test_reference_inside_and_outside(run, reference):
    """A reference in the middle of a share, or beside all steps, and steps that are left out, give the same rows."""
    other = shutil.copytree(run, run.with_name("other"))
    chosen = {"steps": "50-150,250,300", "reference": reference}
    assert list(swept_by(Processes(3), run, **chosen).rows) == sweep(other, **chosen, **LITTLE).rows


def test_overwriting_in_shares(run, alone):
    """Everything is measured again, other settings or not."""
    swept_by(Processes(2), run)
    with pytest.raises(InputError, match="expected"):
        swept_by(Processes(2), run, ablations=("zero", "mean"))
    written = {path.name: path.stat().st_ino for path in (run / "analysis" / "measured").iterdir()}
    report = swept_by(Processes(2), run, overwrite=True)
    assert list(report.rows) == list(alone.rows) and report.log.measured == list(STEPS)
    assert not {(path.name, path.stat().st_ino) for path in (run / "analysis" / "measured").iterdir()} & written.items()


def test_unusable_checkpoint_of_a_share(run):
    """It stops the sweep with its line, or is left out as one process leaves it out."""
    (run / "checkpoints" / "step_000200.pt").write_bytes(b"")
    other = shutil.copytree(run, run.with_name("other"))
    with pytest.raises(InputError, match=r"run/checkpoints/step_000200\.pt: expected"):
        swept_by(Processes(2), run)
    assert not (run / "analysis" / "sweep.json").exists()
    report, alone = swept_by(Processes(2), run, skip_bad=True), sweep(other, skip_bad=True, **LITTLE)
    assert list(report.rows) == alone.rows
    renamed = {file: why.replace("/other/", "/run/") for file, why in alone.log.refused.items()}
    assert report.log.refused == renamed and len(renamed) == 1


def test_other_runs_of_an_unusable_checkpoint(run, alone):
    """Runs before and after the one that is refused get their tables, and one line names it."""
    bad, last = (shutil.copytree(run, run.with_name(name)) for name in ("bad", "last"))
    for step in (100, 200):
        (bad / "checkpoints" / f"step_{step:06d}.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"bad/checkpoints/step_000100\.pt: expected .*") as refusal:
        swept_by(Processes(3), run, bad, last)
    assert "also" not in str(refusal.value)
    for whole in (run, last):
        assert list(StoredRows(RunLayout(whole).rows)) == list(alone.rows)
    assert not (bad / "analysis" / "sweep.json").exists()
    (last / "checkpoints" / "step_000350.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"\(2 of 3 were refused, also .*/last\)"):
        swept_by(Processes(3), run, bad, last)


def test_file_that_a_machine_does_not_list(run, monkeypatch):
    """A checkpoint that the folder does not show on another machine yet is opened by its name; if gone, refused."""
    files = RunDir.open(run).checkpoints
    opened = RunDir.open.__func__

    def late(cls, path):
        found = opened(cls, path)
        return dataclasses.replace(found, checkpoints={step: files[step] for step in STEPS[:-1]})

    share = Share(
        str(run), (("step_000350", 350, str(files[350])),), None, SweepInputs(), SweepSettings(**LITTLE), False
    )
    monkeypatch.setattr(RunDir, "open", classmethod(late))
    assert ShareWorker().measure(share).log.measured == [350]
    files[350].unlink()
    (run / "analysis" / "measured" / "step_000350.npz").unlink()
    with pytest.raises(InputError, match=r"step_000350\.pt"):
        ShareWorker().measure(share)


def test_logistic_probes_in_shares(run):
    """Logistic probes are fitted by the shares that have their checkpoints."""
    other = shutil.copytree(run, run.with_name("other"))
    chosen = {"steps": "50,350", "probe": "logistic"}
    report = swept_by(Processes(2), run, **chosen)
    assert list(report.rows) == sweep(other, **LITTLE | chosen).rows


def test_share_as_json():
    """A share arrives as it was sent."""
    inputs, settings = SweepInputs(steps="50", reference="best"), SweepSettings(memory_gb=2, rank_by="zero", **LITTLE)
    files = (("step_000050", 50, "runs/a/checkpoints/step_000050.pt"), ("best", None, "runs/a/checkpoints/best.pt"))
    share = Share("runs/a", files, None, inputs, settings, still_training=True)
    assert Share.of_json(share.as_json()) == share
