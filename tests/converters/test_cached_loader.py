"""A run's checkpoints through the parameter store: converted once, never taken from another file or a damaged store."""

import concurrent.futures
import shutil
import time
import types

import jax
import kvjax.converters.cached_loader
import kvjax.converters.convert
import numpy as np
import pytest
import torch
from kvjax.converters import parameter_store
from kvjax.converters.cached_loader import CachedLoader
from kvjax.converters.convert_run import convert_run, export_run
from kvjax.converters.parameter_store import read_stored_run

import kvjax
from kvjax.artifacts.checkpoint_sums import ResultStore
from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import InputError
from kvjax.sweeps.logistic_probes import measure_logistic
from kvjax.task.benchmark import Benchmark
from tests.helpers.building import write_small_benchmark
from tests.helpers.opened_files import OpenedFiles
from tests.helpers.stored_runs import TOKENS, Conversions, load_all, same_params, stored_steps


def test_incremental_conversion(loader, small_run, monkeypatch):
    """Stored checkpoints are not converted again, and new ones are added to the store."""
    converted = Conversions(monkeypatch)
    last = small_run / "checkpoints" / "step_000300.pt"
    held_back = last.read_bytes()
    last.unlink()
    first = load_all(loader(), small_run)
    last.write_bytes(held_back)
    again = load_all(loader(), small_run)
    assert converted.files == ["step_000100.pt", "step_000200.pt", "step_000300.pt"]
    assert all(same_params(a, b) for a, b in zip(first, again, strict=False))
    third = load_all(loader(), small_run)
    assert len(converted.files) == 3 and same_params(again[2], third[2])
    assert third[0].certificate == first[0].certificate and third[0].certificate is not None


def test_equal_fields_of_stored_and_converted_checkpoints(loader, small_run):
    """Everything but the parameters' memory is the same whether a checkpoint is converted or read from the store."""
    for converted, stored in zip(load_all(loader(), small_run), load_all(loader(), small_run), strict=True):
        assert same_params(converted, stored)
        for field in (
            "step",
            "config",
            "path",
            "sha256",
            "certificate",
            "recorded_config",
            "recorded_metrics",
            "notes",
        ):
            assert getattr(converted, field) == getattr(stored, field), field


def test_changed_file(loader, small_run, monkeypatch):
    """A file with other bytes than the stored one's is converted again, and replaces the older entry."""
    load_all(loader(), small_run)
    converted = Conversions(monkeypatch)
    path = small_run / "checkpoints" / "step_000200.pt"
    document = torch.load(path, weights_only=True)
    document["model_state"]["final_norm.bias"] += 1.0
    torch.save(document, path)
    loaded = load_all(loader(), small_run)
    assert converted.files == ["step_000200.pt"]
    stored = read_stored_run(small_run / "analysis" / "converted")
    assert [c.path.name for c in stored] == [path.name for path in RunDir.open(small_run).checkpoints.values()]
    assert np.array_equal(loaded[1].params["final_norm"]["bias"], document["model_state"]["final_norm.bias"].numpy())


def test_file_overwritten_before_its_conversion_is_stored(loader, small_run):
    """A conversion is stored under the hash of the bytes that were converted."""
    path = small_run / "checkpoints" / "step_000100.pt"
    own, other = path.read_bytes(), (small_run / "checkpoints" / "step_000200.pt").read_bytes()
    converting = loader()
    params = jax.tree.map(np.array, converting.load(path, 100).params)
    with path.open("r+b") as file:  # in place, as PyTorch saves
        file.write(other)
    converting.save()
    path.write_bytes(own)
    found = loader().load(path, 100)
    assert jax.tree.all(jax.tree.map(np.array_equal, found.params, params))


def test_two_processes_on_one_store(loader, small_run, monkeypatch):
    """Processes that add to one store lose nothing of each other, and leave alone what another is writing."""
    first, second = loader(), loader()
    paths = sorted((small_run / "checkpoints").glob("step_*.pt"))
    first.load(paths[0], None)
    second.load(paths[1], None)
    being_written = small_run / "analysis" / "converted" / ".part_other.tmp"
    being_written.mkdir(parents=True)
    first.save()
    second.save()
    assert being_written.is_dir()
    converted = Conversions(monkeypatch)
    for path in paths[:2]:
        loader().load(path, None)
    assert converted.files == []


def test_processes_that_share_a_store(loader, small_run, monkeypatch):
    """Each waits until the other has named its part; a process that opens the store meanwhile removes none."""
    paths = sorted((small_run / "checkpoints").glob("step_*.pt"))[:2]
    loaders = [loader(shared=True), loader(shared=True)]
    for own, path in zip(loaders, paths, strict=True):
        own.load(path, None)
    write = parameter_store.write_json

    def slowly(*given):
        loader(shared=True)
        time.sleep(0.3)
        write(*given)

    monkeypatch.setattr(parameter_store, "write_json", slowly)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        for saved in [threads.submit(own.save) for own in loaders]:
            saved.result()
    assert stored_steps(small_run / "analysis" / "converted") == [100, 200]


def test_trees_saved_by_several_threads(tmp_path):
    """Threads may write trees at once: Orbax alone mixes up about one save in seven of two threads."""
    trees = [{"bias": np.full((4, 16), number, np.float32)} for number in range(60)]
    paths = [tmp_path / f"tree_{number}" for number in range(60)]
    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        list(threads.map(parameter_store.save_tree, paths, trees))
    read = [parameter_store.load_tree(path) for path in paths]
    assert all(np.array_equal(found["bias"], tree["bias"]) for found, tree in zip(read, trees, strict=True))


def test_store_of_another_identity(loader, small_run, tmp_path, monkeypatch):
    """Conversions for another benchmark, or without certificates, are not used."""
    load_all(loader(certify_on=None), small_run)
    converted = Conversions(monkeypatch)
    certified = load_all(loader(), small_run)
    assert len(converted.files) == 3 and all(c.certificate is not None for c in certified)
    other = Benchmark.open(write_small_benchmark(tmp_path / "other", seed=4))
    load_all(CachedLoader(RunDir.open(small_run), other, certify_on=TOKENS), small_run)
    assert len(converted.files) == 6


def test_verification_without_the_store(loader, small_run, benchmark, monkeypatch):
    """Verifying a run converts every file, whatever is stored."""
    load_all(loader(), small_run)
    converted = Conversions(monkeypatch)
    convert_run(RunDir.open(small_run), benchmark, verify="sample", advance=lambda n: None)
    assert len(converted.files) == 3


def test_configs_of_exported_files(loader, small_run, benchmark):
    """Each exported file has the config that its own trainer recorded, also if they differ and were stored apart."""
    paths = RunDir.open(small_run).checkpoints
    for step, path in paths.items():
        document = torch.load(path, weights_only=True)
        document["config"]["train_spec"]["num_steps"] = 1000 + step
        torch.save(document, path)
        converting = loader()
        converting.load(path, step)
        converting.save()
    folder = export_run(RunDir.open(small_run), verify="sample", advance=lambda n: None).folder
    for step, path in paths.items():
        exported = torch.load(folder / path.name, weights_only=True)
        assert exported["config"]["train_spec"]["num_steps"] == 1000 + step


def test_reads_of_checkpoint_files(small_run, small_benchmark):
    """A sweep reads each `.pt` file once, whether it converts and measures it or only finds that nothing changed."""
    settings = {"benchmark_dir": small_benchmark, "ablations": ("zero",), "probe": "none"}
    opened = OpenedFiles()
    once = {f"step_{step:06d}.pt": 1 for step in (100, 200, 300)}
    kvjax.sweep(small_run, **settings)
    assert opened.taken() == once, "cold"
    kvjax.sweep(small_run, **settings)
    assert opened.taken() == once, "current"
    kvjax.sweep(small_run, **settings, overwrite=True)
    assert opened.taken() == once, "measured again, from the store"


def test_conversions_for_comparisons(small_run, small_benchmark):
    """Checkpoints that are converted only to be compared are stored as well."""
    settings = {"benchmark_dir": small_benchmark, "ablations": ("zero",), "probe": "none"}
    kvjax.sweep(small_run, **settings, event_drift=False)
    folder = small_run / "analysis" / "converted"
    shutil.rmtree(folder)
    kvjax.sweep(small_run, **settings)
    assert stored_steps(folder) == [100, 200, 300]


def test_logistic_probes_of_a_file_that_changed(loader, small_run):
    """Logistic probes are not filed under the hash of a file's earlier bytes."""
    tabled = [("step_000100", types.SimpleNamespace(info={"sha256": "of the earlier bytes"}, step=100))]
    files = {"step_000100": (100, small_run / "checkpoints" / "step_000100.pt")}
    with pytest.raises(InputError, match=r"step_000100.pt: expected a file that stays as it is"):
        measure_logistic(
            tabled, {"step_000100"}, files=files, sweep=None, store=ResultStore(small_run, {}), source=loader()
        )
