"""Units on a real local cluster: equal files whatever the workers, and one line whatever goes wrong."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import dask
import numpy as np
import pytest
import xarray as xr

from kvjax.commands.main import main
from kvjax.errors import InputError, Note
from kvjax.units.unit import Unit
from kvjax.units.worker import Assignment
from tests.helpers import units
from tests.helpers.building import SMALL_MODEL, read_lines, write_run
from tests.helpers.clusters import local_cluster, run_without_dask
from tests.helpers.commands import refused

QUICK = ["--ablations=zero", "--probe=none", "--noprogress"]


@pytest.fixture(scope="module")
def cluster():
    """A cluster that each test scales to the workers it needs."""
    with local_cluster() as opened:
        yield opened


def scheduler_flag(cluster, workers):
    """Scales a cluster, and returns the flag that names its scheduler."""
    cluster.scale(workers)
    return f"--scheduler={cluster.file}"


def done(engine, *given):
    """Runs units and returns their results; checks that progress counts each once."""
    counted = []
    results = engine.run(given, counted.append)
    assert counted == [1] * len(given)
    return results


@pytest.fixture
def four_runs(small_benchmark, tmp_path, monkeypatch):
    """Four copies of a run, and their relative path, which workers know only with the command's folder."""
    monkeypatch.setitem(SMALL_MODEL, "n_layers", 1)
    run = write_run(tmp_path / "runs" / "a", small_benchmark, steps=(100, 200))
    for name in "bcd":
        shutil.copytree(run, run.with_name(name))
    monkeypatch.chdir(tmp_path)
    return "runs"


def contents(analysis):
    """Reads everything that a sweep writes: names, tables and arrays, but for what the work took."""
    found = {}
    for path in sorted(path for path in analysis.rglob("*") if path.is_file()):
        name = path.relative_to(analysis).as_posix()
        if path.suffix == ".nc":
            for group in (None, "intervals", "events"):
                arrays = xr.load_dataset(path, group=group).variables
                found |= {f"{name}/{group}/{key}": (one.dims, plain(one.values)) for key, one in arrays.items()}
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                found |= {f"{name}/{key}": plain(arrays[key]) for key in arrays.files if key != "info"}
        elif path.suffix == ".jsonl":
            found[name] = read_lines(path)
        elif not name.startswith("converted/part_"):  # Orbax draws names in there
            found[name] = sorted(json.loads(path.read_text() or "{}"))
    return found


def plain(values):
    """Turns an array into what compares equal bit by bit, NaN included."""
    return (values.shape, values.tolist() if values.dtype == object else values.tobytes())


def test_equal_files_with_any_number_of_workers(cluster, four_runs, capsys):
    """One, two and four worker processes, and a command without Dask, leave the same files with the same numbers."""
    arguments, found = ["checkpoint-sweep", f"--run_dirs={four_runs}/*", *QUICK], {}
    for workers in (0, 1, 2, 4):
        if workers:
            assert main([*arguments, scheduler_flag(cluster, workers)]) == 0
            printed = capsys.readouterr().out
        else:
            printed = run_without_dask(*arguments)
        assert printed.count("2 measured, 0 reused") == 4
        analyses = {name: Path(four_runs) / name / "analysis" for name in "abcd"}
        found[workers] = {name: contents(analysis) for name, analysis in analyses.items()}
        assert len(found[workers]["a"]) > 100
        for analysis in analyses.values():
            shutil.rmtree(analysis)
    for workers in (1, 2, 4):
        for name in "abcd":
            one, other = found[0][name], found[workers][name]
            assert [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)] == []


def test_workers_share_a_run(cluster, four_runs, capsys):
    """If there are more workers than runs, they share checkpoints: the same files with the same numbers."""
    run_without_dask("checkpoint-sweep", f"--run_dirs={four_runs}/a", *QUICK)
    flag = scheduler_flag(cluster, 2)
    assert main(["checkpoint-sweep", f"--run_dirs={four_runs}/b", *QUICK, flag]) == 0
    assert "2 measured, 0 reused" in capsys.readouterr().out
    one, other = (contents(Path(four_runs) / name / "analysis") for name in "ab")
    assert [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)] == []


def test_results_keep_their_order(cluster):
    """Results come in the order of the units, whichever ends first."""
    seconds = (0.4, 0.0, 0.2)
    given = [Unit("wait", str(one), units.wait, (one,)) for one in seconds]
    found = done(cluster.scale(2), *given)
    assert len(found) == 3 and len(set(found)) == 2, "two processes"


def test_killed_worker(cluster, four_runs, capsys):
    """A worker killed in the middle of a sweep costs nothing but time: the run is swept elsewhere."""
    flag, lock, killed = scheduler_flag(cluster, 2), Path(four_runs) / "b" / "analysis" / "lock", []

    def kill():
        while not killed:
            with contextlib.suppress(OSError, ValueError):
                killed.append(json.loads(lock.read_text())["pid"])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert main(["checkpoint-sweep", f"--run_dirs={four_runs}/*", *QUICK, flag]) == 0
    killer.join()
    assert killed[0] != os.getpid()
    for name in "abcd":
        assert len(read_lines(Path(four_runs) / name / "analysis" / "checkpoint_metrics.jsonl")) == 2
    assert capsys.readouterr().err == ""


def test_worker_out_of_memory(tmp_path):
    """A run that takes more memory than a worker has is named in one line; the other units' files are there."""
    with local_cluster(workers=2, memory="700MB") as frail:
        given = [Unit("write", name, units.write_text, (str(tmp_path / name), name)) for name in "abcdef"]
        hungry = Unit("sweep", "runs/large", units.fill_memory)
        with pytest.raises(InputError) as refusal:
            done(frail.scale(2), *given[:3], hungry, *given[3:])
    line = str(refusal.value)
    assert line.startswith("runs/large: expected its sweep to end (give workers more memory, or see their logs); found")
    assert "2 workers that died, the last tcp://" in line and "\n" not in line
    assert sorted(path.name for path in tmp_path.iterdir()) == list("abcdef")


def test_refused_units(cluster, tmp_path):
    """An error of a unit arrives as itself; with several, the first does, and the others are named."""
    engine = cluster.scale(2)
    wrong = [Unit("look", f"runs/{name}", units.refuse, (f"runs/{name}/file",)) for name in "xyz"]
    right = Unit("write", "runs/a", units.write_text, (str(tmp_path / "a"), "a"))
    with pytest.raises(InputError) as refusal:
        done(engine, wrong[0], right)
    assert str(refusal.value) == "runs/x/file: expected a file; found none" and refusal.value.parameter == "steps"
    with pytest.raises(InputError) as refusal:
        done(engine, right, *wrong)
    assert str(refusal.value) == ("runs/x/file: expected a file; found none (3 of 4 were refused, also runs/y, runs/z)")


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ZeroDivisionError("by zero"), MemoryError()])
def test_unexpected_errors(cluster, error):
    """Any other error of a unit is one line with run and unit, and is not taken for one of the scheduler."""
    with pytest.raises(InputError) as refusal:
        done(cluster.scale(1), Unit("sweep", "runs/x", units.fail, (error,)))
    line = str(refusal.value)
    assert line.startswith(f"runs/x: expected its sweep to end; found {type(error).__name__}: {error}")
    assert "whose log has the traceback" in line and "scheduler" not in line


def test_notes_of_units(cluster, monkeypatch, tmp_path):
    """A note made in a worker is made in the command; the unit worked in the command's folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.warns(Note, match="runs/x: odd"):
        assert done(cluster.scale(1), Unit("tell", "runs/x", units.tell, ("runs/x: odd",))) == [str(tmp_path)]


def test_memory_of_a_worker(cluster):
    """A worker plans with its own limit of memory, not with the machine's."""
    given = Unit("look", "x", units.environment, ("KVJAX_MEMORY_BYTES",))
    assert done(cluster.scale(1), given) == ["4000000000"]


def test_worker_of_another_version(cluster, monkeypatch):
    """A worker with another version of kvjax is refused, and runs nothing."""
    monkeypatch.setattr("kvjax.units.cluster.Assignment", functools.partial(Assignment, version="0.0.1"))
    with pytest.raises(InputError, match=r"scheduler: expected workers with kvjax 0\.0\.1; found"):
        done(cluster.scale(1), Unit("wait", "x", units.wait, (0,)))


def test_folder_that_workers_do_not_see(cluster, monkeypatch, tmp_path):
    """A command in a folder that workers lack is refused by the folder's name."""
    engine = cluster.scale(1)
    monkeypatch.setattr("os.getcwd", lambda: str(tmp_path / "elsewhere"))
    with pytest.raises(InputError, match=r"scheduler: expected a folder that every worker sees, .*elsewhere; found No"):
        done(engine, Unit("tell", "runs/x", units.tell, ("",)))


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="no file system that refuses writing")
def test_folder_that_cannot_be_written(cluster, four_runs, capsys):
    """A results folder that refuses is named in one line; the other runs' results are there."""
    (Path(four_runs) / "b" / "analysis").symlink_to("/sys/kernel")
    flag = scheduler_flag(cluster, 2)
    line = refused(capsys, "checkpoint-sweep", f"--run_dirs={four_runs}/*", *QUICK, flag)
    assert "runs/b/analysis: expected a folder that can be written (or --output_dir); found" in line
    for name in "acd":
        assert (Path(four_runs) / name / "analysis" / "sweep.json").is_file()


def test_results_elsewhere(cluster, four_runs, capsys):
    """`--output_dir` gets a folder per run, and nothing is written into the runs."""
    flag = scheduler_flag(cluster, 2)
    flags = [f"--run_dirs={four_runs}/a,{four_runs}/b", "--output_dir=out", flag, *QUICK]
    assert main(["checkpoint-sweep", *flags]) == 0
    for name in "ab":
        assert (Path("out") / name / "analysis" / "sweep.json").is_file()
        assert not (Path(four_runs) / name / "analysis").exists()


def test_workers_of_several_threads():
    """Workers that would run two units in one process are refused."""
    with local_cluster(threads=2) as wide, pytest.raises(InputError) as refusal:
        done(wide.scale(1), Unit("wait", "x", units.wait, (0,)))
    assert "expected workers of one thread" in str(refusal.value) and "found 2 threads" in str(refusal.value)


def test_scheduler_that_goes_away(tmp_path):
    """A scheduler killed while units run ends the command in one line, and files of units that ended stay."""
    begun, first = tmp_path / "begun", threading.Event()
    given = [
        Unit("write", "runs/a", units.write_text, (str(tmp_path / "a"), "a")),
        Unit("sweep", "runs/b", units.write_after, (str(begun), 600.0, str(tmp_path / "b"))),
    ]

    def kill(scheduler):
        first.wait()
        while not begun.exists():
            time.sleep(0.02)
        scheduler.kill()

    with local_cluster() as opened, pytest.raises(InputError) as refusal:
        threading.Thread(target=kill, args=(opened.scheduler,), daemon=True).start()
        opened.scale(1).run(given, lambda done: first.set())
    line = str(refusal.value)
    assert line.startswith("scheduler: expected a scheduler until the end (1 of 2 units have ended")
    assert "found none at tcp://" in line and (tmp_path / "a").read_text() == "a"


def test_interrupted_command(cluster, tmp_path, request):
    """Ctrl-C ends the command at once; a unit that has begun ends, and the others are not begun."""
    engine, waiting = cluster.scale(1), tmp_path / "begun"

    def interrupt():
        while not waiting.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    handled = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of xdist ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handled))
    threading.Thread(target=interrupt, daemon=True).start()
    begun = Unit("write", "runs/a", units.write_after, (str(waiting), 0.5, str(tmp_path / "a")))
    others = [Unit("write", name, units.write_text, (str(tmp_path / name), name)) for name in "bcd"]
    with pytest.raises(KeyboardInterrupt):
        engine.run([begun, *others], lambda done: None)
    assert done(engine, Unit("wait", "x", units.wait, (0,))), "the worker is free again"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "begun"]


@pytest.fixture
def silent_server():
    """The port of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("scheme", "found"),
    [("tcp", "something that does not greet"), ("tls", "TLS expects"), ("foo", "unknown address scheme")],
)
def test_server_that_is_no_scheduler(silent_server, scheme, found, small_run, capsys):
    """An address of something else, such as a dashboard, is refused in one line."""
    with dask.config.set({"distributed.comm.timeouts.connect": "200ms"}):
        given = f"--scheduler={scheme}://127.0.0.1:{silent_server}"
        line = refused(capsys, "checkpoint-sweep", f"--run_dirs={small_run}", given, *QUICK)
    assert f"--scheduler: expected a scheduler at {scheme}://127.0.0.1:{silent_server}; found {found}" in line


def test_scheduler_that_is_not_there(monkeypatch, small_run, capsys):
    """A command whose scheduler does not answer, or whose flag names none, ends in one line."""
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        line = refused(capsys, "checkpoint-sweep", f"--run_dirs={small_run}", "--scheduler=tcp://127.0.0.1:9", *QUICK)
    assert "--scheduler: expected a scheduler at tcp://127.0.0.1:9; found" in line
    for text in ("nowhere.json", "tcp://host", "8786"):
        line = refused(capsys, "checkpoint-sweep", f"--run_dirs={small_run}", f"--scheduler={text}", *QUICK)
        assert f"or the file that a scheduler wrote; found {text}" in line
    damaged = small_run / "scheduler.json"
    damaged.write_text("[]")
    line = refused(capsys, "checkpoint-sweep", f"--run_dirs={small_run}", f"--scheduler={damaged}", *QUICK)
    assert f"{damaged}: expected the file that a scheduler wrote, with an address; found none" in line
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = refused(capsys, "checkpoint-sweep", f"--run_dirs={small_run}", "--scheduler=a:1", *QUICK)
    assert "--scheduler: expected Dask distributed" in line
    assert not (small_run / "analysis").exists()
