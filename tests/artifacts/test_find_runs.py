"""Runs as people name them: lists, globs, odd names, links, and what lies beside runs."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import xarray as xr

import kvjax
from kvjax.artifacts.find_runs import find_run_dirs, with_results_in
from kvjax.artifacts.results import RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.commands.main import main
from kvjax.errors import InputError, Note
from kvjax.pipeline.settings import ResultSettings, Runs, RunsOnBenchmark, SweepInputs
from kvjax.pipeline.sweep import sweep
from kvjax.pipeline.written_runs import open_to_write
from kvjax.sweeps.settings import SweepSettings
from tests.helpers.building import STEPS, run_config
from tests.helpers.commands import refused


def make_run(path, *, checkpoints=("step_000100.pt",), name="small_run"):
    """Writes a run directory whose checkpoints nobody reads."""
    (path / "checkpoints").mkdir(parents=True)
    (path / "run_config.json").write_text(json.dumps(run_config(path / "no_benchmark") | {"run_name": name}))
    for file in checkpoints:
        (path / "checkpoints" / file).write_bytes(b"weights")
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder that relative names start from."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(*names, **more):
    return [str(run.path) for run in find_run_dirs(names, **more)]


@pytest.mark.parametrize(
    ("made", "named", "expected"),
    [
        (["a,b"], ["a,b"], ["a,b"]),
        (["a,b", "a", "b"], ["a,b"], ["a,b"]),  # an existing path wins over a list
        (["a", "b"], ["a,b"], ["a", "b"]),
        (["a", "b"], ["a, b"], ["a", "b"]),
        (["a,b", "c"], ["a,b,c"], ["a,b", "c"]),
        (["a,b", "c"], ["c,a,b"], ["c", "a,b"]),
        (["a,b", "c"], ["a,b", "c"], ["a,b", "c"]),  # as a repeated flag gives them
        (["g[1]x", "g1x"], ["g[1]x"], ["g[1]x"]),  # and over a glob
        (["g1x"], ["g[1]x"], ["g1x"]),
        (["x*y", "xay"], ["x*y"], ["x*y"]),
        (["x a", "it's"], ["x a,it's"], ["x a", "it's"]),
        (["s1", "s2"], ["s*"], ["s1", "s2"]),
        (["s1", "s2", "t,1"], ["s*,t,*"], ["s1", "s2", "t,1"]),
    ],
)
def test_names_of_runs(here, made, named, expected):
    """Names with commas and brackets are taken as they are if they exist."""
    for name in made:
        make_run(here / name)
    assert found(*named) == expected


def test_repeated_flag(here, capsys):
    """`--run_dirs` can be repeated, and names with commas and brackets reach the commands."""
    for name in ("a,b", "g[1]x", "c"):
        make_run(here / name)
    assert main(["status", "--run_dirs=a,b", "--run_dirs=g[1]x,c"]) == 0
    printed = capsys.readouterr().out
    assert [line.split("), ")[1] for line in printed.splitlines() if "(seed" in line] == ["a,b", "g[1]x", "c"]
    assert "--run_dirs=a,b\n" in printed and "--run_dirs='g[1]x'\n" in printed


def test_spellings_of_one_run(here):
    """`path`, `./path`, `path/` and the whole path are one run, without a word."""
    make_run(here / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found("run", "./run", "run/", str(here / "run")) == ["run"]


def test_link_to_a_run(here):
    """A link to a run is that run; a note says so."""
    make_run(here / "run")
    (here / "link").symlink_to("run")
    with pytest.warns(Note, match="run is the same run as link, which counts"):
        assert found("link", "run") == ["link"]
    with pytest.warns(Note, match="run is the same run as link"):
        assert found("*") == ["link"]


def test_what_lies_beside_runs(here):
    """A glob skips with one note what is no run, each with its reason."""
    make_run(here / "r1")
    make_run(here / "empty", checkpoints=())
    make_run(here / "best", checkpoints=("best.pt",))
    (here / "notes.txt").write_text("x")
    (here / "figures").mkdir()
    (here / "gone").symlink_to("nowhere")
    expected = (
        r"skipped among \*: empty \(no checkpoints\), figures \(no run_config.json\), gone \(a link to nothing\), "
        r"notes.txt \(a file\)"
    )
    with pytest.warns(Note, match=expected):
        assert found("*", needs="checkpoints") == ["best", "r1"]
    with pytest.warns(Note, match=r"best \(no step checkpoints\)"):
        assert found("*", needs="step checkpoints") == ["r1"]
    with pytest.warns(Note):
        assert found("*") == ["best", "empty", "r1"]
    assert found("empty", needs="step checkpoints") == ["empty"], "what is named is opened"


@pytest.mark.parametrize(
    ("named", "complaint"),
    [
        (["notes.txt"], "notes.txt: expected a run directory; found a file"),
        (["gone"], "gone: expected a run directory; found a link to nowhere, which does not exist"),
        (["figures"], "run_config.json"),
        (["absent"], "absent: expected a run directory; found none"),
        (["r1,absent"], "absent: expected a run directory; found none"),
        (["z*"], "run_dirs: expected run directories matching z*; found none"),
        (["n*,r1"], "run_dirs: expected run directories matching n*; found notes.txt (a file)"),
        ([""], "run_dirs: expected one or more run directories; found none"),
        ([","], "run_dirs: expected one or more run directories; found none"),
    ],
)
def test_names_of_no_run(here, named, complaint):
    """A name has to be a run's, and a glob has to find one."""
    make_run(here / "r1")
    (here / "notes.txt").write_text("x")
    (here / "figures").mkdir()
    (here / "gone").symlink_to("nowhere")
    with pytest.raises(InputError) as refusal:
        found(*named)
    assert complaint in str(refusal.value)


@pytest.mark.parametrize("files", [("step_100.pt", "step_000100.pt"), ("step_0100.pt", "step_100.pt")])
def test_copy_under_another_padding(here, files):
    """Two equal files of one step are one checkpoint, under the usual name if it is there; a note says so."""
    make_run(here / "run", checkpoints=(*files, "step_000200.pt"))
    with pytest.warns(Note, match="is a copy of .*, which counts for step 100"):
        run = RunDir.open(here / "run")
    assert list(run.checkpoints) == [100, 200]
    assert run.checkpoints[100].name == ("step_000100.pt" if "step_000100.pt" in files else "step_0100.pt")


def test_two_checkpoints_of_one_step(here):
    """Two different files of one step are refused, both by name."""
    make_run(here / "run", checkpoints=("step_000100.pt", "step_100.pt"))
    (here / "run" / "checkpoints" / "step_100.pt").write_bytes(b"others")
    with pytest.raises(InputError, match=r"step_100.pt: expected one checkpoint of step 100 .*found step_000100.pt as"):
        RunDir.open(here / "run")


def test_results_elsewhere(swept_run, tmp_path, capsys):
    """A sweep into another folder writes there what it writes into the run, and commands take the folder as the run."""
    usual, out = RunResults(RunDir.open(swept_run)), tmp_path / "out"
    rows, metrics = usual.rows, usual.metrics
    shutil.rmtree(swept_run / "analysis")
    settings = SweepSettings(ablations=("zero",), probe="none", event_drift=False)
    (report,) = sweep(
        RunsOnBenchmark.of([swept_run]), SweepInputs(), settings, results=ResultSettings(output_dir=str(out))
    )
    assert report.run.path == out and not (swept_run / "analysis").exists()
    elsewhere = RunResults(RunDir.open(out))
    assert elsewhere.rows == rows
    xr.testing.assert_identical(elsewhere.metrics, metrics)
    assert main(["status", f"--run_dirs={out}"]) == 0
    printed = capsys.readouterr().out
    assert f"(seed 5), {out}\n" in printed and "yes  sweep complete" in printed
    assert f"Next: kvjax birth-windows --run_dirs={out}\n" in printed
    assert kvjax.open_run(out).steps == STEPS


def test_results_of_several_runs_elsewhere(here):
    """Several runs get a folder each, named as their directories; names that repeat are refused."""
    runs = find_run_dirs([str(make_run(here / folder / name)) for folder, name in (("x", "s1"), ("x", "s2"))])
    assert [str(run.path) for run in with_results_in(runs, here / "out")] == [
        str(here / "out" / n) for n in ("s1", "s2")
    ]
    assert [str(run.path) for run in with_results_in(runs[:1], here / "out")] == [str(here / "out" / "s1")]
    again = find_run_dirs([str(make_run(here / "y" / "s1"))])
    with pytest.raises(InputError, match=r"output_dir: expected run directories of different names .*x/s1 and .*y/s1"):
        with_results_in([*runs, *again], here / "other")
    with_results_in(runs[:1], here / "one")
    with pytest.raises(InputError, match=r"output_dir: expected a folder for .* several runs; found those of one"):
        with_results_in(runs, here / "one")


def test_folder_that_is_taken(here):
    """Results go neither into another run's directory nor among another run's results."""
    first, second = find_run_dirs([str(make_run(here / "first")), str(make_run(here / "second", name="other"))])
    with pytest.raises(InputError, match=r"second: expected a folder for the results of .*first; found a run"):
        with_results_in([first], here / "second")
    with_results_in([first], here / "out")
    with pytest.raises(InputError, match=r"results of .*second \(or another `output_dir`\); found those of .*first"):
        with_results_in([second], here / "out")
    assert with_results_in([first], here / "first")[0].analysis == here / "first" / "analysis"
    assert not (here / "first" / "source_run.json").exists()


def test_run_that_was_moved(here):
    """Results whose run is gone say where its new path goes; naming both mends it as well."""
    with_results_in(find_run_dirs([str(make_run(here / "run"))]), here / "out")
    (here / "run").rename(here / "moved")
    expected = r'source_run.json: expected in "path" the run directory .*moved\); found .*/run, which does not exist'
    with pytest.raises(InputError, match=expected):
        RunDir.open(here / "out")
    with pytest.warns(Note, match=r"the run was at .*/run and is at .*/moved now"):
        with_results_in(find_run_dirs(["moved"]), here / "out")
    assert RunDir.open(here / "out").layout.path == here / "moved"


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"path": 3, "run_name": "x", "seed": 1}'])
def test_damaged_record_of_a_source_run(here, content):
    """A damaged `source_run.json` is one line."""
    with_results_in(find_run_dirs([str(make_run(here / "run"))]), here / "out")
    (here / "out" / "source_run.json").write_text(content)
    with pytest.raises(InputError, match=r"source_run.json: expected"):
        RunDir.open(here / "out")


def test_run_and_its_results_named_together(here):
    """A run directory and a folder of its results are one run."""
    make_run(here / "run")
    with_results_in(find_run_dirs(["run"]), here / "out")
    with pytest.warns(Note, match="run is the same run as out, which counts"):
        assert found("out", "run") == ["out"]


@pytest.fixture
def read_only_run(untied_run, tmp_path_factory):
    """A run in a directory that this process may not write, and a folder that it may."""
    is_root = os.geteuid() == 0  # permission bits do not bind root: the test goes on as another user
    folder = Path(tempfile.mkdtemp(dir="/tmp")) if is_root else tmp_path_factory.mktemp("read_only")
    run = shutil.copytree(untied_run, folder / "run")
    (out := folder / "out").mkdir()
    folder.chmod(0o755)
    for path in (run, run / "checkpoints"):
        path.chmod(0o555)
    if is_root:
        os.chown(out, 65534, 65534)
        os.seteuid(65534)
    yield run, out
    if is_root:
        os.seteuid(0)
    for path in (run, run / "checkpoints"):
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_read_only_run(read_only_run, capsys):
    """A run that cannot be written is refused with the flag that helps, and that flag helps."""
    run, out = read_only_run
    line = refused(capsys, "evaluate", "--noprogress", f"--run_dirs={run}")
    assert line.endswith(
        f"{run}/analysis: expected a folder that can be written (or --output_dir); found Permission denied"
    )
    for given in (ResultSettings(output_dir=str(out)), ResultSettings()):
        with open_to_write(Runs.of([run if given.output_dir else out]), given) as (opened,):
            (opened.analysis / "anything").write_text("written")
    assert (out / "analysis" / "anything").is_file() and not (run / "analysis").exists()
