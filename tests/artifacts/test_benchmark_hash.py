"""A benchmark's hash: it covers the records of every split, and knows the hash that earlier versions recorded."""

import hashlib
import json
import shutil

import pytest

from kvjax.artifacts.benchmark_hash import BenchmarkHashes
from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import InputError
from kvjax.task.benchmark import Benchmark
from kvjax.task.probe_set import generate_probe_set, open_probe_set
from tests.helpers.building import write_small_benchmark


@pytest.fixture
def benchmark(small_benchmark, tmp_path):
    return shutil.copytree(small_benchmark, tmp_path / "benchmark")


def without_hashes(folder):
    """Writes a benchmark's metadata as earlier versions did, and returns the hash by which they named it."""
    path = folder / "metadata.json"
    document = json.loads(path.read_text())
    for facts in document["splits"].values():
        del facts["sha256"]
    path.write_text(json.dumps(document, indent=2) + "\n")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def swap_two_records(path):
    """Puts a split's first two records in the other order: as many bytes, every record sound."""
    first, second, *others = path.read_text().splitlines(keepends=True)
    path.write_text("".join([second, first, *others]))


def test_hashes_in_the_metadata(benchmark):
    """The metadata holds the hash of every split, so that its own hash covers them; no other file is read."""
    content = (benchmark / "metadata.json").read_bytes()
    for split, facts in json.loads(content)["splits"].items():
        assert facts["sha256"] == hashlib.sha256((benchmark / f"{split}.jsonl").read_bytes()).hexdigest()
    hashes = BenchmarkHashes.of(benchmark)
    assert hashes.sha256 == hashlib.sha256(content).hexdigest()
    assert hashes.earlier == without_hashes(benchmark)


def test_split_of_another_benchmark(benchmark, tmp_path):
    """A split of another seed, and the same records in another order, are refused by the file's name."""
    other = write_small_benchmark(tmp_path / "other", seed=4)
    shutil.copy(other / "test_iid.jsonl", benchmark)
    swap_two_records(benchmark / "train.jsonl")
    opened = Benchmark.open(benchmark)
    with pytest.raises(InputError, match=r"test_iid\.jsonl"):
        opened.read_split("test_iid")
    with pytest.raises(InputError, match=r"train\.jsonl: expected the file that metadata.json records, SHA-256"):
        opened.read_split("train")


@pytest.mark.parametrize("split", ["train", "test_iid", "counterfactual"])
def test_benchmark_without_hashes(benchmark, split):
    """Without hashes in the metadata the files are hashed: other records give another hash, a moved folder the same."""
    earlier = without_hashes(benchmark)
    before = BenchmarkHashes.of(benchmark)
    assert before.earlier == earlier != before.sha256
    assert BenchmarkHashes.of(benchmark.rename(benchmark.parent / "moved")) == before
    moved = benchmark.parent / "moved"
    swap_two_records(moved / f"{split}.jsonl")
    after = BenchmarkHashes.of(moved)
    assert after.sha256 != before.sha256 and after.earlier == earlier
    (moved / f"{split}.jsonl").unlink()
    assert BenchmarkHashes.of(moved).sha256 not in (before.sha256, after.sha256)


def rename_benchmark(manifest, sha256):
    """Lets a probe set's manifest name its benchmark by another hash."""
    document = json.loads(manifest.read_text()) | {"benchmark_sha256": sha256}
    del document["content_sha256"]
    content = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps(document | {"content_sha256": content}))


@pytest.mark.parametrize("generated_again", [False, True])
def test_probe_set_of_an_earlier_version(benchmark, small_benchmark, tmp_path, generated_again):
    """A probe set that names its benchmark by the earlier hash opens, also after the benchmark was generated again."""
    path = tmp_path / "probe.jsonl"
    generate_probe_set(Benchmark.open(benchmark), path, examples_per_split=4, fit_examples=8, seed=1)
    rename_benchmark(tmp_path / "probe.metadata.json", without_hashes(benchmark))
    used = Benchmark.open(small_benchmark if generated_again else benchmark)
    assert len(open_probe_set(path, used).fit_records) == 8
    rename_benchmark(tmp_path / "probe.metadata.json", "0" * 64)
    with pytest.raises(InputError, match="one built from another benchmark"):
        open_probe_set(path, used)


def test_swept_benchmark_that_changed(benchmark, small_run, monkeypatch):
    """The benchmark of a sweep stands in for a recorded one that is gone, unless a split of it has changed."""
    without_hashes(benchmark)
    path = small_run / "run_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"benchmark_dir": "data/gone"}))
    swept_on = type("Named", (), {"path": str(benchmark), "sha256": BenchmarkHashes.of(benchmark).sha256})
    monkeypatch.setattr("kvjax.artifacts.run_dir.read_sweep", lambda path: type("Sweep", (), {"benchmark": swept_on}))
    assert RunDir.open(small_run).benchmark_dir() == benchmark
    swap_two_records(benchmark / "test_iid.jsonl")
    with pytest.raises(InputError, match="data/gone"):
        RunDir.open(small_run).benchmark_dir()
