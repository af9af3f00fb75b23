"""What a sweep that was stopped leaves: the next one makes up for it, and no reader takes it for a whole one."""

import shutil

import pytest
from kvjax.converters.parameter_store import read_stored_run, stored_sha256s

from kvjax.artifacts import files
from kvjax.artifacts.files import file_sha256
from kvjax.artifacts.results import RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import InputError
from kvjax.pipeline.sweep_state import checkpoints_are_measured
from tests.helpers.building import STEPS, read_lines
from tests.helpers.stored_runs import Conversions
from tests.helpers.sweeping import SMALL_SWEEP, sweep

LITTLE = {"ablations": SMALL_SWEEP.ablations, "probe": SMALL_SWEEP.probe}
TABLES = ["checkpoint_metrics.jsonl", "heads.jsonl", "mlps.jsonl", "checkpoint_metrics.nc", "sweep.json"]


class Killed(BaseException):
    """Stands for a kill: no code handles it."""


@pytest.fixture(scope="module")
def complete(tmp_path_factory, untied_run):
    """A swept run directory; tests copy it."""
    run = shutil.copytree(untied_run, tmp_path_factory.mktemp("complete") / "run")
    sweep(run, **LITTLE)
    return run


@pytest.fixture
def run(complete, tmp_path):
    return shutil.copytree(complete, tmp_path / "run")


def test_store_that_was_never_written(run, monkeypatch):
    """A sweep that finds all measured converts what the store lacks, and the one after it converts nothing."""
    before = {checkpoint.step: checkpoint for checkpoint in read_stored_run(run / "analysis" / "converted")}
    shutil.rmtree(run / "analysis" / "converted")
    conversions = Conversions(monkeypatch)
    report = sweep(run, **LITTLE)
    assert report.log.measured == [] and sorted(conversions.files) == [f"step_{step:06d}.pt" for step in STEPS]
    stored = stored_sha256s(run / "analysis" / "converted")
    assert stored == {file_sha256(path) for path in RunDir.open(run).checkpoints.values()}
    for checkpoint in read_stored_run(run / "analysis" / "converted"):
        assert checkpoint.certificate == before[checkpoint.step].certificate
    conversions.files.clear()
    sweep(run, **LITTLE)
    assert conversions.files == []


@pytest.mark.parametrize("renamed", range(len(TABLES) + 1))
def test_killed_among_the_renamings(run, monkeypatch, renamed):
    """Of two sweeps' tables a reader gets the earlier ones, the later ones, or a refusal; never some of each."""
    layout = RunDir.open(run).layout
    earlier = read_lines(layout.rows)
    real, done = files.Replacements._replace, []

    def replace(self, path):
        if path.name in TABLES:
            if len(done) == renamed:
                raise Killed
            done.append(path.name)
        real(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(files.Replacements, "_replace", replace)
        try:
            sweep(run, ablations=("zero",), probe="ridge", overwrite=True)
        except Killed:
            assert renamed < len(TABLES)
    assert done == TABLES[:renamed]
    state = checkpoints_are_measured(RunDir.open(run))
    results = RunResults(RunDir.open(run))
    if 0 < renamed < len(TABLES):
        assert not state.holds and "checkpoint-sweep" in state.command
        with pytest.raises(InputError, match=r"checkpoint_metrics.jsonl: expected the .* that sweep.json records"):
            _ = results.rows
    else:
        later = sweep(run, ablations=("zero",), probe="ridge").rows if renamed else earlier
        assert results.rows == later and results.metrics.sizes["step"] == len(STEPS)
        results.check_tables()
    assert not list(run.rglob("*.kvjax-partial*"))
