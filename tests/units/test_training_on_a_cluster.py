"""`train` and what runs go through after it, on a local cluster: the files that the commands leave in one process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from kvjax.artifacts.layout import RunLayout
from kvjax.commands.main import main
from tests.helpers.building import SMALL_MODEL, read_lines
from tests.helpers.clusters import local_cluster, run_without_dask
from tests.helpers.commands import refused
from tests.helpers.training import SGD, small_train_config

SEEDS = (3, 4, 5)


@pytest.fixture(scope="module")
def cluster():
    """A cluster that each test scales to the workers it needs; they compile as they do for people."""
    with local_cluster(optimised=True) as opened:
        yield opened


@pytest.fixture(scope="module")
def whole(small_benchmark, tmp_path_factory):
    """A folder with the config of a small training, and its seeds trained in one process of one device, in `whole`."""
    folder = tmp_path_factory.mktemp("whole")
    write_config(folder, small_benchmark)
    run_without_dask(*training(folder, "whole"), optimised=True)
    return folder


def write_config(folder, benchmark, **changes):
    model = SMALL_MODEL | {"n_layers": 1, "n_heads": 2}
    config = small_train_config(benchmark, **({"num_steps": 32, "model": model, "optimization": SGD} | changes))
    (folder / "train.json").write_text(config.model_dump_json())


def training(folder, output, *flags, seeds=SEEDS):
    named = f"--seeds={','.join(map(str, seeds))}"
    return [
        "train",
        f"--config={folder / 'train.json'}",
        named,
        f"--output_dir={folder / output}",
        "--noprogress",
        *flags,
    ]


@pytest.fixture
def place(whole, tmp_path):
    """A folder of a test's own, with the same config."""
    shutil.copy(whole / "train.json", tmp_path)
    return tmp_path


def contents(folder, *, resumed=False):
    """Reads what training wrote: names, tensors, rows and records, without the output's own name."""
    found = {}
    for path in (path for path in Path(folder).rglob("*") if path.is_file() and not path.name.endswith("lock")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".pt":
            document = torch.load(path, weights_only=True)
            state = document["optimizer_state"]["state"]
            tensors = document["model_state"] | {str(n): entry["momentum_buffer"] for n, entry in state.items()}
            found |= {f"{name}/{key}": tensor.numpy().tobytes() for key, tensor in tensors.items()}
            found[f"{name}/groups"] = document["optimizer_state"]["param_groups"]
        elif path.suffix == ".jsonl":
            found[name] = [row for row in read_lines(path) if not resumed or row["phase"] != "resume"]
        else:
            found[name] = json.loads(path.read_text().replace(str(folder), "OUTPUT"))
    return found


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def scheduler(cluster, workers):
    cluster.scale(workers)
    return f"--scheduler={cluster.file}"


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_equal_files(cluster, whole, place, capsys, workers):
    """Any number of workers leaves the files of one process: tensors, rows and records."""
    assert main(training(place, "there", scheduler(cluster, workers))) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out.count("validation_iid") == len(SEEDS)
    assert_equal(contents(whole / "whole"), contents(place / "there"))
    line = refused(capsys, *training(place, "there", f"--scheduler={cluster.file}"))
    assert "expected an empty run directory (or --resume, or --overwrite)" in line


def test_killed_worker(cluster, place, small_benchmark):
    """A worker killed in the middle costs what its runs trained since their last checkpoint."""
    write_config(place, small_benchmark, num_steps=640)  # long enough to be killed before its end
    run_without_dask(*training(place, "alone"), optimised=True)
    flag, killed = scheduler(cluster, 2), []
    run = place / "there" / f"seed_{SEEDS[0]}"

    def kill():
        while not (run / "checkpoints" / "step_000008.pt").exists():
            time.sleep(0.005)
        with contextlib.suppress(OSError, ValueError):
            killed.append(json.loads(RunLayout(run).training_lock.read_text())["pid"])
            os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert main(training(place, "there", flag)) == 0
    killer.join()
    assert killed and killed[0] != os.getpid()
    assert_equal(contents(place / "alone", resumed=True), contents(place / "there", resumed=True))


def test_resume_and_overwrite(cluster, whole, place, small_benchmark, capsys):
    """`--resume` goes on, prolongs, and begins what a stopped call had not; `--overwrite` trains from nothing."""
    flag = scheduler(cluster, 2)
    there = place / "there"
    shutil.copytree(whole / "whole", there)
    first, second, third = (there / f"seed_{seed}" for seed in SEEDS)
    (first / "checkpoints" / "step_000032.pt").unlink()
    (first / "summary.json").unlink()
    shutil.rmtree(third)
    kept = (second / "summary.json").read_bytes()
    assert main(training(place, "there", flag, "--resume")) == 0
    assert (second / "summary.json").read_bytes() == kept, "it had ended"
    ours, theirs = (contents(folder, resumed=True) for folder in (there, whole / "whole"))
    differing = [name for name in theirs if ours[name] != theirs[name]]
    places = ("run_config.json", "best_checkpoint.json", "/groups", f"{second.name}/summary.json")
    recorded = [name for name in differing if name.endswith(places)]
    assert differing == recorded, "only where the run was when it was copied"
    write_config(place, small_benchmark, num_steps=40)
    assert main(training(place, "there", flag, "--resume")) == 0
    for run in (first, second, third):
        assert (run / "checkpoints" / "step_000040.pt").is_file() and (run / "summary.json").is_file()
    write_config(place, small_benchmark)
    (third / "analysis").mkdir()
    capsys.readouterr()
    assert main(training(place, "there", flag, "--overwrite")) == 0
    assert "seed_5/analysis was removed" in capsys.readouterr().err
    assert_equal(contents(whole / "whole"), contents(there))


def test_refused(cluster, place, capsys, small_benchmark):
    """A directory of other files, nothing to resume, or a split that is not there is one line; nothing changes."""
    flag = scheduler(cluster, 1)
    (place / "there" / "seed_4").mkdir(parents=True)
    (place / "there" / "seed_4" / "mine.txt").write_text("x")
    for more in ((), ("--overwrite",)):
        line = refused(capsys, *training(place, "there", flag, *more))
        assert "seed_4: expected " in line
    line = refused(capsys, *training(place, "there", flag, "--resume"))
    assert "expected a run to resume; found none" in line
    write_config(place, small_benchmark, evaluation={"batch_size": 8, "tracked_splits": ["validation_iid", "nowhere"]})
    line = refused(capsys, *training(place, "elsewhere", flag))
    assert (
        "expected the tracked split nowhere; found none (2 of 2 were refused" in line or "nowhere; found none" in line
    )
    assert [path.name for path in (place / "there").rglob("*") if path.is_file()] == ["mine.txt"]


def test_ranking(cluster, whole, place, capsys):
    """`select-reference` ranks on workers as in one process, and prints the same."""
    runs = f"--run_dirs={whole / 'whole'}/*"
    here = run_without_dask("select-reference", runs, "--noprogress", f"--output={place / 'here.json'}", optimised=True)
    arguments = ["select-reference", runs, "--noprogress", f"--output={place / 'there.json'}"]
    assert main([*arguments, scheduler(cluster, 2)]) == 0
    assert capsys.readouterr().out.replace("there.json", "here.json") == here
    assert (place / "there.json").read_text() == (place / "here.json").read_text()
    assert len(json.loads((place / "here.json").read_text())["candidates"]) == len(SEEDS)


def test_status_comparison_and_report(cluster, whole, place, capsys):
    """`status`, `compare-seeds` and `report` give on a worker what they give in one process."""
    flag, runs = scheduler(cluster, 2), f"--run_dirs={place / 'runs'}/*"
    shutil.copytree(whole / "whole", place / "runs")
    run_without_dask("checkpoint-sweep", runs, "--noprogress", "--ablations=zero", "--probe=none")
    run_without_dask("birth-windows", runs, "--noprogress")
    for command in (["status"], ["compare-seeds", "--output_dir="], ["report", "--noprogress", "--output="]):
        printed = []
        for side in ("here", "there"):
            output = [f"{one}{place / side}" if one.endswith("=") else one for one in command[1:]]
            arguments = [command[0], runs, *(f"{one}.html" if "--output=" in one else one for one in output)]
            if side == "here":
                printed.append(run_without_dask(*arguments, optimised=True))
            else:
                assert main([*arguments, flag]) == 0
                printed.append(capsys.readouterr().out)
        assert printed[0] == printed[1].replace(str(place / "there"), str(place / "here"))
    ours, theirs = (json.loads((place / side / "comparison.json").read_text()) for side in ("here", "there"))
    assert ours["findings"] == theirs["findings"] and ours["births"] == theirs["births"]
    assert (place / "here.html").read_bytes() == (place / "there.html").read_bytes()
