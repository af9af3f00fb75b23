"""Probe sets: fixed, covering, immutable, and bound to their benchmark."""

import json
from collections import Counter

import pytest

from kvjax.errors import InputError
from kvjax.task.benchmark import Benchmark
from kvjax.task.probe_set import (
    check_installable,
    generate_probe_set,
    install_probe_set,
    open_probe_set,
    own_probe_set,
)
from kvjax.task.selection import COVERED_AXES, assign_difficulty, choose_examples
from tests.helpers.building import read_lines, write_small_benchmark


def make(benchmark, path, **changes):
    settings = {"examples_per_split": 10, "fit_examples": 16, "seed": 17} | changes
    return generate_probe_set(Benchmark.open(benchmark), path, **settings)


@pytest.fixture
def probe(small_benchmark, tmp_path):
    return make(small_benchmark, tmp_path / "probe.jsonl")


def labels(record):
    return [
        (axis, record["axes"].get(axis, event.get(axis))) for event in record["query_events"] for axis in COVERED_AXES
    ]


def test_records_of_every_split(probe, small_benchmark):
    """Each split gives the examples asked for, each a record of the benchmark."""
    assert set(probe.manifest.split_counts) == {
        "validation_iid",
        "heldout_pairs",
        "structural_ood",
        "counterfactual",
    }
    for split, count in probe.manifest.split_counts.items():
        known = {record["sample_id"]: record for record in read_lines(small_benchmark / f"{split}.jsonl")}
        members = [record for record in probe.records if record["split"] == split]
        assert count == len(members) == 10 + probe.manifest.added_for_coverage[split]
        assert all(known[record["sample_id"]] == record for record in members)
        assert len({record["sample_id"] for record in members}) == len(members)


def test_coverage(probe, small_benchmark):
    """Each value of a covered axis has eight reads, or all that the split has."""
    for split in probe.manifest.splits:
        pool = Counter(x for r in read_lines(small_benchmark / f"{split}.jsonl") for x in labels(r))
        have = Counter(x for r in probe.records if r["split"] == split for x in labels(r))
        for label, total in pool.items():
            assert have[label] >= min(8, total), (split, label)


def test_coverage_counts(probe):
    """The metadata's coverage counts are counts of reads."""
    for split, axes in probe.manifest.coverage.items():
        events = sum(len(record["query_events"]) for record in probe.records if record["split"] == split)
        assert all(sum(counts.values()) == events for counts in axes.values())


def test_order_of_rare_signatures():
    """Records of rare signatures are chosen first."""

    def fake(n, keys):
        axes = dict.fromkeys(
            (
                "overwrite_count",
                "num_queries",
                "total_writes",
                "mean_query_lag",
                "max_query_lag",
                "context_tokens",
            ),
            1,
        )
        event = {"writes_since_support": 1, "tokens_since_support": 3, "slot_after_write": 2}
        return {"sample_id": f"x_{n}", "axes": {"active_keys": keys, **axes}, "query_events": [event]}

    pool = [fake(n, 2) for n in range(99)] + [fake(99, 3)]
    chosen = choose_examples(pool, 10, seed="s")
    assert len(chosen) == 10 and pool[99] in chosen
    assert chosen == choose_examples(pool, 10, seed="s")
    assert chosen != choose_examples(pool, 10, seed="t")


def test_share_of_difficulties(probe):
    """At least a quarter of each split is easy and a quarter hard."""
    for split in probe.manifest.splits:
        members = [record for record in probe.records if record["split"] == split]
        tags = Counter(probe.manifest.difficulty[record["sample_id"]] for record in members)
        assert min(tags["easy"], tags["hard"]) >= len(members) / 4


def test_lags_of_hard_examples(probe):
    """Hard examples ask further back than easy ones."""
    tags = assign_difficulty(probe.records)

    def mean_distance(tag):
        far = [
            sum(e["tokens_since_support"] for e in r["query_events"]) / len(r["query_events"])
            for r in probe.records
            if r["split"] == "validation_iid" and tags[r["sample_id"]] == tag
        ]
        return min(far), max(far)

    assert mean_distance("easy")[1] <= mean_distance("hard")[0]


def test_sources_of_counterfactuals(probe):
    """Each counterfactual comes with its source record."""
    counterfactuals = [record for record in probe.records if record["split"] == "counterfactual"]
    assert len(counterfactuals) == len(probe.sources)
    for record in counterfactuals:
        assert probe.sources[record["sample_id"]]["sample_id"] == record["counterfactual_of"]


def test_fit_set(probe, small_benchmark):
    """The fit set is drawn from the training split without repeats."""
    train = {record["sample_id"] for record in read_lines(small_benchmark / "train.jsonl")}
    ids = [record["sample_id"] for record in probe.fit_records]
    assert len(ids) == 16 == len(set(ids)) and set(ids) <= train


def test_existing_probe_set(probe, small_benchmark):
    """A probe set is never written over."""
    with pytest.raises(InputError, match="immutable"):
        make(small_benchmark, probe.path)


@pytest.mark.parametrize("name", ["probe.jsonl", "probe.fit.jsonl", "probe.sources.jsonl"])
def test_edited_file(probe, small_benchmark, name):
    """An edited file of a probe set is refused."""
    path = probe.path.with_name(name)
    path.write_text(path.read_text().replace("V0", "V1", 1))
    with pytest.raises(InputError, match="edited"):
        open_probe_set(probe.path, Benchmark.open(small_benchmark))


def test_edited_manifest(probe, small_benchmark):
    """An edited manifest is refused."""
    path = probe.path.with_suffix(".metadata.json")
    document = json.loads(path.read_text())
    sample = next(iter(document["difficulty"]))
    document["difficulty"][sample] = "easy" if document["difficulty"][sample] == "hard" else "hard"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="edited"):
        open_probe_set(probe.path, Benchmark.open(small_benchmark))


def test_probe_set_of_another_benchmark(probe, tmp_path):
    """A probe set of another benchmark is refused."""
    other = write_small_benchmark(tmp_path / "other", seed=4)
    with pytest.raises(InputError, match="another benchmark"):
        open_probe_set(probe.path, Benchmark.open(other))


class TestReferenceProbeSet:
    """One that the reference tool wrote: records and a metadata file of its own, nothing else."""

    @pytest.fixture
    def path(self, small_benchmark, tmp_path):
        records = read_lines(small_benchmark / "validation_iid.jsonl")[:6]
        records += read_lines(small_benchmark / "counterfactual.jsonl")[:6]
        path = tmp_path / "given" / "probe_set.jsonl"
        path.parent.mkdir()
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        metadata = {"benchmark_dir": "elsewhere", "examples_per_split": 6, "num_records": 12, "seed": 17}
        path.with_suffix(".metadata.json").write_text(json.dumps(metadata))
        return path

    def test_companion_files(self, path, small_benchmark):
        """It is accepted unchanged, and missing parts are written beside it."""
        before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
        probe = open_probe_set(path, Benchmark.open(small_benchmark))
        assert {name: (path.parent / name).read_bytes() for name in before} == before
        assert len(probe.sources) == 6 and len(probe.fit_records) == 80  # all of a small train split
        again = open_probe_set(path, Benchmark.open(small_benchmark))
        assert again.manifest == probe.manifest

    def test_edit_before_the_first_use(self, path, small_benchmark):
        """One edited before its first use is refused."""
        lines = path.read_text().splitlines()
        lines[3] = json.dumps(json.loads(lines[3]) | {"sample_id": "validation_iid_900000"})
        path.write_text("\n".join(lines) + "\n")
        with pytest.raises(InputError, match=r"probe_set.jsonl:4: expected a record of the benchmark"):
            open_probe_set(path, Benchmark.open(small_benchmark))

    def test_repeated_record(self, path, small_benchmark):
        """One that holds a record twice is refused."""
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:5], lines[0], *lines[6:]]) + "\n")
        with pytest.raises(InputError, match=r"probe_set.jsonl:6: expected a sample_id of its own; .*, that of line 1"):
            open_probe_set(path, Benchmark.open(small_benchmark))

    def test_edit_after_the_first_use(self, path, small_benchmark):
        """One edited after its first use is refused."""
        open_probe_set(path, Benchmark.open(small_benchmark))
        path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
        with pytest.raises(InputError, match="edited"):
            open_probe_set(path, Benchmark.open(small_benchmark))

    def test_copy_of_a_run(self, path, small_benchmark, tmp_path):
        """A copy in an analysis folder opens like the original."""
        benchmark = Benchmark.open(small_benchmark)
        probe = open_probe_set(path, benchmark)
        install_probe_set(probe, tmp_path / "analysis" / "probe_set.jsonl")
        copy = open_probe_set(tmp_path / "analysis" / "probe_set.jsonl", benchmark)
        assert copy.manifest == probe.manifest


def test_replacing_a_probe_set(probe, small_benchmark, tmp_path):
    """Another probe set of a run is replaced only if asked."""
    other = make(small_benchmark, tmp_path / "second.jsonl", seed=18)
    install_probe_set(probe, tmp_path / "analysis" / "probe_set.jsonl")
    check_installable(probe, tmp_path / "analysis" / "probe_set.jsonl")
    with pytest.raises(InputError, match="another probe set"):
        check_installable(other, tmp_path / "analysis" / "probe_set.jsonl")
    install_probe_set(other, tmp_path / "analysis" / "probe_set.jsonl")
    installed = open_probe_set(tmp_path / "analysis" / "probe_set.jsonl", Benchmark.open(small_benchmark))
    assert installed.manifest.seed == 18


def test_interrupted_probe_set(small_benchmark, tmp_path):
    """A probe set without a manifest is made anew."""
    benchmark = Benchmark.open(small_benchmark)
    first = own_probe_set(tmp_path / "probe_set.jsonl", benchmark)
    first.path.with_suffix(".metadata.json").unlink()
    assert own_probe_set(tmp_path / "probe_set.jsonl", benchmark).manifest == first.manifest


@pytest.mark.parametrize("line", ["{}", "3", "[]", "null", '{"sample_id": 3}'])
def test_split_of_no_records(tmp_path, line):
    """A split file that does not hold records is refused by name."""
    folder = write_small_benchmark(tmp_path / "benchmark")
    lines = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
    with pytest.raises(InputError, match=r"train.jsonl:2: expected a benchmark record"):
        make(folder, tmp_path / "probe.jsonl")
    assert not list(tmp_path.glob("probe*")), "nothing is left behind"
