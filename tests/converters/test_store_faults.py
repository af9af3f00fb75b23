"""A parameter store that is damaged, cannot be written, or runs out of room."""

import json
import re
import shutil
import subprocess
import sys
import types

import kvjax.converters.cached_loader
import kvjax.converters.convert
import pytest
from kvjax.converters import parameter_store
from kvjax.converters.convert_run import convert_run
from kvjax.converters.parameter_store import read_stored_run

import kvjax
from kvjax.artifacts.run_dir import RunDir
from kvjax.commands.main import main
from kvjax.errors import InputError
from tests.helpers.stored_runs import Conversions, hold_at_most, load_all, same_params, stored_steps


def swap_places(document):
    one, other, *_ = document["checkpoints"]
    one["index"], other["index"] = other["index"], one["index"]


def place_before_the_first(document):
    document["checkpoints"][0]["index"] = -1


def place_after_the_last(document):
    document["checkpoints"][0]["index"] = 3


def empty_certificate(document):
    document["checkpoints"][0]["certificate"] = {}


def other_certificate(document):
    document["checkpoints"][0]["certificate"]["max_abs_difference"] = 0.0


def other_step(document):
    document["checkpoints"][0]["step"] += 1


def other_hash(document):
    for stored in document["checkpoints"]:
        stored["digest"] = "0" * 64


def other_config(document):
    next(iter(document["recorded_configs"].values()))["train_spec"] = {}


DAMAGED_ENTRIES = [
    *(other_hash, swap_places, place_before_the_first, place_after_the_last),
    *(empty_certificate, other_certificate, other_step, other_config),
]


@pytest.mark.parametrize("damage", ["data", "no JSON", *DAMAGED_ENTRIES])
def test_damaged_store(loader, small_run, monkeypatch, damage):
    """Damaged parameters and entries are never trusted: their checkpoints are converted again, and stored again."""
    whole = load_all(loader(), small_run)
    folder = small_run / "analysis" / "converted"
    manifest = folder / "manifest.json"
    if damage == "data":
        for file in folder.rglob("*"):
            if file.is_file() and file != manifest:
                file.write_bytes(file.read_bytes()[:10])
    elif damage == "no JSON":
        manifest.write_text("{")
    else:
        document = json.loads(manifest.read_text())
        damage(document)
        manifest.write_text(json.dumps(document))
    with pytest.raises(InputError, match="the parameters the manifest names" if damage == "data" else "manifest"):
        list(read_stored_run(folder))
    converted = Conversions(monkeypatch)
    again = load_all(loader(), small_run)
    damaged = {swap_places: 2, place_after_the_last: 1, other_certificate: 1, other_step: 1}.get(damage, 3)
    assert len(converted.files) == damaged and all(same_params(a, b) for a, b in zip(whole, again, strict=True))
    assert [c.step for c in again] == [100, 200, 300]
    load_all(loader(), small_run)
    assert len(converted.files) == damaged, "the rebuilt store holds everything again"
    assert stored_steps(folder) == [100, 200, 300]
    parts = {stored["part"] for stored in json.loads(manifest.read_text())["checkpoints"]}
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "lock", *parts}, (
        "no part is left that nothing names"
    )


@pytest.fixture
def in_the_way(small_run):
    """A file at the store's path."""
    path = small_run / "analysis" / "converted"
    path.parent.mkdir()
    path.write_text("in the way")
    return path


def test_sweep_beside_an_unwritable_store(loader, small_run, in_the_way, monkeypatch):
    """A store that cannot be written fails no checkpoint; `save` raises, and writes once it can."""
    hold_at_most(monkeypatch, loader, small_run, 2)
    converting = loader()
    for step, path in RunDir.open(small_run).checkpoints.items():
        assert converting.load(path, step).step == step
    with pytest.raises(InputError, match=r"converted.*: expected a directory that can be written"):
        converting.save()
    in_the_way.unlink()
    converting.save()
    assert stored_steps(in_the_way) == [100, 200], "the conversions that were held when writing failed first"


def test_conversion_of_a_run_beside_an_unwritable_store(loader, small_run, benchmark, in_the_way, monkeypatch):
    """Converting a run stops at the first failed write: no more is converted, and nothing that was is lost."""
    hold_at_most(monkeypatch, loader, small_run, 2)
    converted = Conversions(monkeypatch)
    with pytest.raises(InputError, match=r"converted.*: expected a directory that can be written"):
        convert_run(RunDir.open(small_run), benchmark, verify="none", advance=lambda n: None)
    assert converted.files == ["step_000100.pt", "step_000200.pt"]
    in_the_way.unlink()
    convert_run(RunDir.open(small_run), benchmark, verify="none", advance=lambda n: None)
    assert stored_steps(in_the_way) == [100, 200, 300]


def test_parts_of_bounded_size(loader, small_run, monkeypatch):
    """Conversions are written as soon as they fill a part, counted in bytes."""
    hold_at_most(monkeypatch, loader, small_run, 2)
    converting = loader()
    for step, path in RunDir.open(small_run).checkpoints.items():
        converting.load(path, step)
    assert stored_steps(small_run / "analysis" / "converted") == [100, 200]
    assert [checkpoint.step for checkpoint in converting._held] == [300]


def test_manifest_that_cannot_be_written(loader, small_run, monkeypatch):
    """A part whose manifest cannot be written is removed again."""
    paths = RunDir.open(small_run).checkpoints
    first = loader()
    first.load(paths[100], 100)
    first.save()
    second = loader()
    second.load(paths[200], 200)

    def full(path, document):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parameter_store, "write_json", full)
    with pytest.raises(InputError, match=r"converted: expected a folder that can be written; found .*No space left"):
        second.save()
    folder = small_run / "analysis" / "converted"
    assert stored_steps(folder) == [100]
    assert len(list(folder.iterdir())) == 3, "manifest, lock and part"


def test_parts_held_in_memory(loader, small_run, monkeypatch):
    """Parts are read when they are needed, once as long as they are held, and no more than two are held."""
    adding = loader()
    for step, path in RunDir.open(small_run).checkpoints.items():
        adding.load(path, step)
        adding.save()
    read, real = [], parameter_store.load_tree
    monkeypatch.setattr(parameter_store, "load_tree", lambda path: read.append(path) or real(path))
    reading = loader()
    paths = RunDir.open(small_run).checkpoints
    for step in (100, 200, 100, 200):
        assert reading.load(paths[step], step).step == step
    assert len(read) == 2
    reading.load(paths[300], 300)
    reading.load(paths[100], 100)
    assert len(read) == 4, "the third part took the place of the first"


def test_full_disk(loader, small_run, small_benchmark, monkeypatch, capsys):
    """A full disk gives one line, and leaves the stored checkpoints as they were."""
    load_all(loader(), small_run)
    folder = small_run / "analysis" / "converted"
    before = sorted(path.name for path in folder.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=500_000))
    flags = [f"--run_dirs={small_run}", f"--benchmark_dir={small_benchmark}", "--to=flax", "--noprogress"]
    assert main(["convert", *flags]) == 2
    printed = capsys.readouterr().err
    assert re.fullmatch(f"kvjax convert: {folder}: expected a disk with 1 MB free; found 0 MB\n", printed)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert stored_steps(folder) == [100, 200, 300]


def test_write_that_ends_half_way(loader, small_run, small_benchmark):
    """A write that fails half way raises, and leaves the stored checkpoints as they were.

    A limit on the size of files stands for quotas, and for disks that fill up while they are written to.
    """
    code = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from kvjax.artifacts.checkpoint_sums import ResultStore
from kvjax.artifacts.run_dir import RunDir
from kvjax.converters.cached_loader import CachedLoader
from kvjax.errors import InputError
from kvjax.sweeps.logistic_probes import measure_logistic
from kvjax.task.benchmark import Benchmark
run, benchmark = RunDir.open(Path(sys.argv[1])), Benchmark.open(Path(sys.argv[2]))
def add(step):
    loader = CachedLoader(run, benchmark, certify_on=None)
    loader.load(run.checkpoints[step], step)
    loader.save()
add(100)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    add(200)
except InputError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(small_run), str(small_benchmark)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    folder = small_run / "analysis" / "converted"
    assert done.stdout.startswith(f"{folder}: expected a folder that can be written; found ")
    assert stored_steps(folder) == [100]
    assert len(list(folder.iterdir())) == 3, "nothing half written is left"


def test_loading_without_keeping(loader, small_run, monkeypatch):
    """A loader that keeps nothing holds and writes nothing."""
    monkeypatch.setattr(kvjax.converters.cached_loader, "_HELD_BYTES", 1)
    load_all(loader(keep="nothing"), small_run)
    assert not (small_run / "analysis").exists()


@pytest.mark.parametrize("manifest", ["there", "missing", "damaged"])
def test_part_that_a_killed_process_did_not_name(loader, small_run, manifest):
    """The next process that writes the store removes it; one that only reads does not."""
    folder = small_run / "analysis" / "converted"
    convert_all = loader()
    load_all(convert_all, small_run)
    convert_all.save()
    (named,) = folder.glob("part_*")
    unnamed = shutil.copytree(named, folder / "part_0123456789abcdef")
    if manifest == "missing":
        (folder / "manifest.json").unlink()
    elif manifest == "damaged":
        (folder / "manifest.json").write_text("{")
    loader(keep="nothing")
    assert unnamed.is_dir()
    again = loader()
    assert unnamed.is_dir() == (manifest == "damaged") and named.is_dir() == (manifest != "missing")
    load_all(again, small_run)
    again.save()
    assert stored_steps(folder) == [100, 200, 300]
