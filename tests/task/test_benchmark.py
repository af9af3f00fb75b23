"""Benchmarks: the rules of a fair test, the same bytes for the same seed, and settings that cannot work."""

import hashlib
import itertools
import json
import shutil

import pytest

from kvjax.config.benchmark import BenchmarkConfig
from kvjax.config.files import find_config, read_config
from kvjax.errors import InputError
from kvjax.task.benchmark import Benchmark, check_diagnostics, generate_benchmark
from kvjax.task.generator import draw_benchmark
from tests.helpers.building import read_lines, small_benchmark_config, write_small_benchmark

SPLITS = ("train", "validation_iid", "test_iid", "heldout_pairs", "structural_ood", "counterfactual")


@pytest.fixture(scope="module")
def records(small_benchmark):
    return {split: read_lines(small_benchmark / f"{split}.jsonl") for split in SPLITS}


@pytest.fixture(scope="module")
def metadata(small_benchmark):
    return json.loads((small_benchmark / "metadata.json").read_text())


def heldout(metadata):
    return {tuple(pair.split(":")) for pair in metadata["holdout_pairs"]}


def test_replay_of_every_record(records, small_benchmark):
    """Every record follows from its tokens alone, answers and supports included."""
    benchmark = Benchmark.open(small_benchmark)
    for split, members in records.items():
        assert benchmark.check_records(members, small_benchmark, split) == members


def test_writes_of_a_stream(records):
    """A stream writes each value once, and never writes one key twice in a row."""
    for members in records.values():
        for record in members:
            values = [write["value"] for write in record["writes"]]
            keys = [write["key"] for write in record["writes"]]
            assert len(set(values)) == len(values)
            assert all(a != b for a, b in itertools.pairwise(keys))


def test_spread_of_overwrites(records):
    """The overwrites of a stream are spread evenly over its keys."""
    for record in records["train"]:
        keys = [write["key"] for write in record["writes"]]
        overwrites = [keys.count(key) - 1 for key in set(keys)]
        assert max(overwrites) - min(overwrites) <= 1


def test_keys_of_reads(records):
    """A read asks for a key that was overwritten, at a lag that the config allows."""
    for split, members in records.items():
        lag = (2, 3) if split == "structural_ood" else (1, 2)
        for record in members:
            for event in record["query_events"]:
                assert lag[0] <= event["writes_since_support"] <= lag[1]
                earlier = record["writes"][: event["support_write_index"]]
                assert event["key"] in {write["key"] for write in earlier}


def test_heldout_pairs(records, metadata):
    """Held-out pairs are written in their own split alone."""
    pairs = heldout(metadata)
    assert len(pairs) == int(4 * 48 * 0.3)
    for split, members in records.items():
        used = {(write["key"], write["value"]) in pairs for record in members for write in record["writes"]}
        assert used == {split == "heldout_pairs"}


def test_no_repeated_streams(records):
    """No stream repeats within a split or across splits."""
    sequences = [record["exact_sequence_signature"] for members in records.values() for record in members]
    assert len(set(sequences)) == len(sequences)


def test_counterfactuals(records):
    """A counterfactual differs from its source in the value of one supporting write."""
    sources = {record["sample_id"]: record for record in records["test_iid"]}
    for record in records["counterfactual"]:
        source, changed = sources[record["counterfactual_of"]], record["changed_write_index"]
        different = [
            a["write_index"]
            for a, b in zip(source["writes"], record["writes"], strict=True)
            if a["value"] != b["value"]
        ]
        assert different == [changed] and source["query_plan"] == record["query_plan"]
        assert changed in {event["support_write_index"] for event in record["query_events"]}
        assert len(source["tokens"]) == len(record["tokens"])


def test_seeds_of_a_benchmark(tmp_path, small_benchmark):
    """The same seed gives the same bytes, another seed gives others."""

    def digest(folder):
        files = sorted(folder.iterdir())
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    assert digest(write_small_benchmark(tmp_path / "again")) == digest(small_benchmark)
    assert digest(write_small_benchmark(tmp_path / "other", seed=4)) != digest(small_benchmark)


def change(folder, edit):
    """Edits a benchmark's metadata."""
    path = folder / "metadata.json"
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def empty(folder):
    """Takes all records of a split, and says so in the metadata."""
    (folder / "train.jsonl").write_text("")
    change(folder, lambda metadata: metadata["splits"]["train"].update(num_samples=0))


def generate(tmp_path, **changes):
    config = BenchmarkConfig.model_validate(small_benchmark_config(**changes))
    return generate_benchmark(config, tmp_path / "benchmark", overwrite=False)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"holdout_answer_pair_fraction": 0.05}, r"at least 4 held-out values for every key .*; found 2"),
        ({"num_keys": 2}, "num_keys = 2; found max 3"),
        ({"num_values": 12}, "held-out values"),
        (
            {"train": {**small_benchmark_config()["train"], "num_queries": {"min": 3, "max": 9}}},
            r"train.num_queries: expected at most 5 reads, all that 2 active keys, 6 overwrites",
        ),
    ],
)
def test_impossible_settings(tmp_path, changes, complaint):
    """Settings that no stream can satisfy are refused with the numbers that do not fit."""
    with pytest.raises(InputError, match=complaint):
        generate(tmp_path, **changes)
    assert not (tmp_path / "benchmark").exists()


def test_too_few_distinct_streams(tmp_path):
    """Running out of distinct streams is an error."""
    tiny = {
        "num_samples": 2000,
        "active_keys": {"min": 2, "max": 2},
        "overwrite_count": {"min": 1, "max": 1},
        "num_queries": {"min": 1, "max": 1},
        "query_lag": {"min": 0, "max": 0},
    }
    changes = dict.fromkeys(("train", "validation_iid", "test_iid", "heldout_pairs", "structural_ood"), tiny)
    with pytest.raises(InputError, match="2000 distinct streams"):
        generate(tmp_path, num_keys=2, num_values=8, holdout_answer_pair_fraction=0.5, **changes)


def test_strong_heuristic(tmp_path):
    """A heuristic above the limit is an error that names it."""
    with pytest.raises(InputError, match=r"heuristic most_frequent_value_before_query at or below 0.0"):
        generate(tmp_path, heuristic_max_accuracy=0.0)


def test_leaked_pairs(metadata):
    """Held-out pairs outside their split are an error."""
    leaked = json.loads(json.dumps(metadata["diagnostics"]))
    leaked["holdout_leakage"]["train"]["heldout_pair_uses"] = 1
    with pytest.raises(InputError, match=r"train: expected no held-out pairs"):
        check_diagnostics(leaked, 0.4)


def test_existing_directory(small_benchmark):
    """An existing directory is kept unless overwriting is asked for."""
    config = BenchmarkConfig.model_validate(small_benchmark_config(seed=9))
    before = (small_benchmark / "metadata.json").read_bytes()
    with pytest.raises(InputError, match="overwrite"):
        generate_benchmark(config, small_benchmark, overwrite=False)
    assert (small_benchmark / "metadata.json").read_bytes() == before


def test_overwrite_of_a_foreign_directory(tmp_path):
    """Overwriting never removes a directory that holds no benchmark."""
    (tmp_path / "thesis.txt").write_text("years of work")
    config = BenchmarkConfig.model_validate(small_benchmark_config())
    with pytest.raises(InputError, match="an earlier benchmark"):
        generate_benchmark(config, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").exists()


def test_shipped_config():
    """The shipped config holds the reference trainer's settings."""
    config = read_config(find_config("symbolic_kv_base", "benchmark"), BenchmarkConfig)
    assert (config.seed, config.num_keys, config.num_values) == (7, 8, 128)
    assert config.train.num_samples == 8000 and config.structural_ood.query_lag.max == 3


def test_misspelt_config_field(tmp_path):
    """A misspelt field of a config is refused by name."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(small_benchmark_config(num_key=4)))
    with pytest.raises(InputError, match="num_key"):
        read_config(path, BenchmarkConfig)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda d: (d / "metadata.json").unlink(), "a benchmark directory"),
        (lambda d: (d / "metadata.json").write_text("{"), "a JSON file"),
        (lambda d: (d / "train.jsonl").unlink(), "the records of split train"),
        (lambda d: (d / "train.jsonl").write_text("{}\n"), "80 records"),
        (lambda d: (d / "train.jsonl").write_text("{}\n{\n"), r"train.jsonl:2"),
        (lambda d: (d / "train.jsonl").write_bytes((d / "train.jsonl").read_text().encode("utf-16")), "in UTF-8"),
        (lambda d: change(d, lambda m: m["splits"]["train"].update(num_samples=True)), "splits.train with a whole"),
        (lambda d: change(d, lambda m: m["splits"].clear()), "at least one split; found none"),
        (lambda d: change(d, lambda m: m.pop("holdout_pairs")), "found no holdout_pairs"),
        (lambda d: change(d, lambda m: m.update(holdout_pairs={})), "holdout_pairs, a list of texts .*; found dict"),
        (lambda d: change(d, lambda m: m["holdout_pairs"].append(3)), 'each a text "key:value" .*; found 3'),
        (lambda d: change(d, lambda m: m["holdout_pairs"].append("K00")), 'each a text "key:value" .*; found K00'),
        (
            lambda d: change(d, lambda m: m["splits"]["train"].update(num_query_events=1)),
            "num_query_events 1 .*; found",
        ),
        (lambda d: change(d, lambda m: m["splits"]["train"].update(sha256="0" * 64)), "SHA-256 000000000000 .*; found"),
        (lambda d: empty(d), "train.jsonl: expected at least one record; found none"),
    ],
)
def test_damaged_benchmark(tmp_path, small_benchmark, damage, complaint):
    """A damaged benchmark is refused with the file that is damaged."""
    folder = shutil.copytree(small_benchmark, tmp_path / "benchmark")
    damage(folder)
    with pytest.raises(InputError, match=complaint):
        Benchmark.open(folder).read_split("train")


def test_wide_ranges_of_sizes():
    """Ranges of many sizes are checked at their ends, so that drawing starts at once."""
    wide = small_benchmark_config()["train"] | {
        "num_samples": 1,
        "active_keys": {"min": 2, "max": 40},
        "overwrite_count": {"min": 20, "max": 120},
        "num_queries": {"min": 1, "max": 2},
    }
    splits = dict.fromkeys(("train", "validation_iid", "test_iid", "heldout_pairs", "structural_ood"), wide)
    document = small_benchmark_config(num_keys=40, num_values=800, **splits)
    drawn = draw_benchmark(BenchmarkConfig.model_validate(document | {"counterfactual": {"num_samples": 1}}))[2]
    assert all(len(records) == 1 for records in drawn.values())
