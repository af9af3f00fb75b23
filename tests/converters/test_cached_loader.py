"""A run's checkpoints through the parameter store: converted once, and never another file's or damaged parameters."""

import json
import re
import shutil
import subprocess
import sys
import types

import jax
import kvjax.converters.cached_loader
import kvjax.converters.convert
import numpy as np
import pytest
import torch
from kvjax.converters.cached_loader import CheckpointLibrary
from kvjax.converters.convert_run import convert_run

from kvjax.artifacts import parameter_store
from kvjax.artifacts.parameter_store import read_stored_run
from kvjax.artifacts.run_dir import RunDir
from kvjax.commands.main import main
from kvjax.errors import InputError
from kvjax.task.benchmark import Benchmark
from tests.helpers.building import write_small_benchmark


@pytest.fixture
def benchmark(small_benchmark):
    return Benchmark.open(small_benchmark)


@pytest.fixture
def library(small_run, benchmark):
    """Opens the small run's checkpoints through the store, as a fresh process would."""
    run = RunDir.open(small_run)
    return lambda **given: CheckpointLibrary(run, benchmark, **{"certify_on": TOKENS, **given})


TOKENS = np.array([[1, 8, 10, 14, 2]], np.int32)


def load_all(library, small_run):
    loaded = [library.load(path, step) for step, path in RunDir.open(small_run).checkpoints.items()]
    library.save()
    return loaded


def same_params(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a.params, b.params))


class Unread:
    """Stands in for the converter, to see which files are converted."""

    def __init__(self, monkeypatch):
        self.files, real = [], kvjax.converters.convert.convert_checkpoint

        def counted(path, *args, **kwargs):
            self.files.append(path.name)
            return real(path, *args, **kwargs)

        monkeypatch.setattr(kvjax.converters.convert, "convert_checkpoint", counted)


def test_what_is_stored_is_not_converted_again_and_new_checkpoints_are_added(library, small_run, monkeypatch):
    converted = Unread(monkeypatch)
    last = small_run / "checkpoints" / "step_000300.pt"
    held_back = last.read_bytes()
    last.unlink()
    first = load_all(library(), small_run)
    last.write_bytes(held_back)
    again = load_all(library(), small_run)
    assert converted.files == ["step_000100.pt", "step_000200.pt", "step_000300.pt"]
    assert all(same_params(a, b) for a, b in zip(first, again, strict=False))
    third = load_all(library(), small_run)
    assert len(converted.files) == 3 and same_params(again[2], third[2])
    assert third[0].certificate == first[0].certificate and third[0].certificate is not None


def test_a_changed_file_is_converted_again(library, small_run, monkeypatch):
    load_all(library(), small_run)
    converted = Unread(monkeypatch)
    path = small_run / "checkpoints" / "step_000200.pt"
    document = torch.load(path, weights_only=True)
    document["model_state"]["final_norm.bias"] += 1.0
    torch.save(document, path)
    loaded = load_all(library(), small_run)
    assert converted.files == ["step_000200.pt"]
    stored, _ = read_stored_run(small_run / "analysis" / "converted")
    assert [c.file for c in stored.checkpoints] == [path.name for path in RunDir.open(small_run).checkpoints.values()]
    assert np.array_equal(loaded[1].params["final_norm"]["bias"], document["model_state"]["final_norm.bias"].numpy())


def swap_places(document):
    one, other, *_ = document["checkpoints"]
    one["index"], other["index"] = other["index"], one["index"]


def place_before_the_first(document):
    document["checkpoints"][0]["index"] = -1


def empty_certificate(document):
    document["checkpoints"][0]["certificate"] = {}


def other_hash(document):
    document["parts"] = dict.fromkeys(document["parts"], "0" * 64)


@pytest.mark.parametrize(
    "damage", ["data", "no JSON", other_hash, swap_places, place_before_the_first, empty_certificate]
)
def test_a_damaged_store_is_rebuilt_never_trusted(library, small_run, monkeypatch, damage):
    whole = load_all(library(), small_run)
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
        read_stored_run(folder)
    converted = Unread(monkeypatch)
    again = load_all(library(), small_run)
    assert len(converted.files) == 3 and all(same_params(a, b) for a, b in zip(whole, again, strict=True))
    load_all(library(), small_run)
    assert len(converted.files) == 3, "the rebuilt store holds everything again"
    assert len(list(folder.iterdir())) == 2, "one manifest and one part are left"


def test_a_file_written_anew_before_its_conversion_is_kept_leaves_nothing_wrong(library, small_run):
    path = small_run / "checkpoints" / "step_000100.pt"
    own, other = path.read_bytes(), (small_run / "checkpoints" / "step_000200.pt").read_bytes()
    converting = library()
    params = jax.tree.map(np.array, converting.load(path, 100).params)
    with path.open("r+b") as file:  # in place, as PyTorch saves
        file.write(other)
    converting.save()
    path.write_bytes(own)
    found = library().load(path, 100)
    assert jax.tree.all(jax.tree.map(np.array_equal, found.params, params))


def test_two_processes_that_add_to_one_store_lose_nothing_of_each_other(library, small_run, monkeypatch):
    first, second = library(), library()
    paths = sorted((small_run / "checkpoints").glob("step_*.pt"))
    first.load(paths[0], None)
    second.load(paths[1], None)
    being_written = small_run / "analysis" / "converted" / ".part_other.tmp"
    being_written.mkdir(parents=True)
    first.save()
    second.save()
    assert being_written.is_dir()
    converted = Unread(monkeypatch)
    for path in paths[:2]:
        library().load(path, None)
    assert converted.files == []


def test_a_store_made_for_another_benchmark_or_without_certificates_is_not_used(
    library, small_run, tmp_path, monkeypatch
):
    load_all(library(certify_on=None), small_run)
    converted = Unread(monkeypatch)
    certified = load_all(library(), small_run)
    assert len(converted.files) == 3 and all(c.certificate is not None for c in certified)
    other = Benchmark.open(write_small_benchmark(tmp_path / "other", seed=4))
    load_all(CheckpointLibrary(RunDir.open(small_run), other, certify_on=TOKENS), small_run)
    assert len(converted.files) == 6


def test_verifying_converts_anew(library, small_run, benchmark, monkeypatch):
    load_all(library(), small_run)
    converted = Unread(monkeypatch)
    convert_run(RunDir.open(small_run), benchmark, verify="sample", advance=lambda n: None)
    assert len(converted.files) == 3


@pytest.fixture
def in_the_way(small_run):
    """A file where the store would be."""
    path = small_run / "analysis" / "converted"
    path.parent.mkdir()
    path.write_text("in the way")
    return path


def test_a_store_that_cannot_be_written_fails_no_checkpoint_and_is_told_at_the_end(
    library, small_run, in_the_way, monkeypatch
):
    monkeypatch.setattr(kvjax.converters.cached_loader, "_KEPT_AT_ONCE", 2)
    converting = library()
    for step, path in RunDir.open(small_run).checkpoints.items():
        assert converting.load(path, step).step == step
    with pytest.raises(InputError, match=r"converted.*: expected a directory that can be written"):
        converting.save()
    in_the_way.unlink()
    converting.save()
    stored, _ = read_stored_run(in_the_way)
    assert [c.step for c in stored.checkpoints] == [100, 200], "what was held when writing failed first"


def test_converting_a_run_stops_where_the_store_cannot_be_written(small_run, benchmark, in_the_way, monkeypatch):
    """Its conversions are what it is for: none is let go, and nothing more is converted."""
    monkeypatch.setattr(kvjax.converters.cached_loader, "_KEPT_AT_ONCE", 2)
    converted = Unread(monkeypatch)
    with pytest.raises(InputError, match=r"converted.*: expected a directory that can be written"):
        convert_run(RunDir.open(small_run), benchmark, verify="none", advance=lambda n: None)
    assert converted.files == ["step_000100.pt", "step_000200.pt"]
    in_the_way.unlink()
    convert_run(RunDir.open(small_run), benchmark, verify="none", advance=lambda n: None)
    assert [c.step for c in read_stored_run(in_the_way)[0].checkpoints] == [100, 200, 300]


def test_a_manifest_that_cannot_be_written_leaves_no_part_behind(library, small_run, monkeypatch):
    paths = RunDir.open(small_run).checkpoints
    first = library()
    first.load(paths[100], 100)
    first.save()
    second = library()
    second.load(paths[200], 200)

    def full(path, document):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parameter_store, "write_json", full)
    with pytest.raises(InputError, match=r"converted: expected a folder that can be written; found .*No space left"):
        second.save()
    folder = small_run / "analysis" / "converted"
    assert [c.step for c in read_stored_run(folder)[0].checkpoints] == [100]
    assert len(list(folder.iterdir())) == 2


def test_no_more_parts_are_held_than_fit(library, small_run, monkeypatch):
    adding = library()
    for step, path in RunDir.open(small_run).checkpoints.items():
        adding.load(path, step)
        adding.save()
    assert adding._store._parts == {}, "what was written is on the disk"
    read, real = [], parameter_store.load_tree
    monkeypatch.setattr(parameter_store, "load_tree", lambda path: read.append(path) or real(path))
    for room, times in ((1 << 20, 1), (1, 2)):
        monkeypatch.setattr(parameter_store, "_BYTES_AT_HAND", room)
        read.clear()
        reading = library()
        for _ in range(2):
            for step, path in RunDir.open(small_run).checkpoints.items():
                assert reading.load(path, step).step == step
        assert len(read) == 3 * times


def test_a_full_disk_is_one_line_and_leaves_what_was_stored(library, small_run, small_benchmark, monkeypatch, capsys):
    load_all(library(), small_run)
    folder = small_run / "analysis" / "converted"
    before = sorted(path.name for path in folder.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=500_000))
    flags = [f"--run_dirs={small_run}", f"--benchmark_dir={small_benchmark}", "--to=flax", "--noprogress"]
    assert main(["convert", *flags]) == 2
    printed = capsys.readouterr().err
    assert re.fullmatch(f"kvjax convert: {folder}: expected a disk with 1 MB free; found 0 MB\n", printed)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert [c.step for c in read_stored_run(folder)[0].checkpoints] == [100, 200, 300]


def test_a_write_that_ends_half_way_is_refused_and_leaves_what_was_stored(tmp_path):
    """A limit on the size of files stands for quotas and for disks that fill up while they are written to."""
    code = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from kvjax.artifacts.parameter_store import NewCheckpoint, ParameterStore
from kvjax.commands.main import main
from kvjax.errors import InputError
def add(step, size):
    noise = np.random.default_rng(step).normal(size=size).astype(np.float32)
    new = NewCheckpoint(step, f"step_{step}.pt", str(step), None, {}, [], {"kernel": noise})
    ParameterStore(Path(sys.argv[1]), {}).add([new], {})
add(1, 1000)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    add(2, 100_000)
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path}: expected a folder that can be written; found ")
    manifest, (params,) = read_stored_run(tmp_path)
    assert [c.step for c in manifest.checkpoints] == [1] and params["kernel"].shape == (1000,)
    assert len(list(tmp_path.iterdir())) == 2, "nothing half written is left"


def test_looking_without_keeping_holds_and_writes_nothing(library, small_run, monkeypatch):
    monkeypatch.setattr(kvjax.converters.cached_loader, "_KEPT_AT_ONCE", 2)
    load_all(library(keep="nothing"), small_run)
    assert not (small_run / "analysis").exists()
