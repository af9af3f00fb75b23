"""Records are checked whole: whatever contradicts the tokens is refused with its place, before anybody uses it."""

import copy
import hashlib
import json
import shutil

import pytest

from kvjax.errors import InputError
from kvjax.task.benchmark import Benchmark
from kvjax.task.probe_set import generate_probe_set, open_probe_set
from kvjax.task.record_check import check_counterfactual, check_record
from kvjax.task.stream import Program, Read, build_record
from kvjax.task.vocabulary import Vocabulary
from tests.helpers.building import read_lines
from tests.helpers.commands import refused

VOCABULARY = Vocabulary.of_size(2, 5)
HELDOUT = frozenset({("K00", "V002")})
# Two keys, written and overwritten, then read: written out by hand.
STREAM = "<bos> W K00 V000 W K01 V001 W K00 V002 W K01 V003 R K00 V002 R K01 V003 <eos>"
RECORD = {
    "sample_id": "x_0",
    "split": "x",
    "tokens": STREAM.split(),
    "token_ids": [1, 8, 10, 12, 8, 11, 13, 8, 10, 14, 8, 11, 15, 9, 10, 14, 9, 11, 15, 2],
    "axes": {
        "active_keys": 2,
        "overwrite_count": 2,
        "num_queries": 2,
        "total_writes": 4,
        "mean_query_lag": 0,
        "max_query_lag": 1,
        "context_tokens": 20,
    },
    "counterfactual_of": None,
    "exact_sequence_signature": STREAM,
    "writes": [
        {"write_index": 0, "key": "K00", "value": "V000"},
        {"write_index": 1, "key": "K01", "value": "V001"},
        {"write_index": 2, "key": "K00", "value": "V002"},
        {"write_index": 3, "key": "K01", "value": "V003"},
    ],
    "query_plan": [
        {"slot_after_write": 3, "key": "K00", "support_write_index": 2, "writes_since_support": 1},
        {"slot_after_write": 3, "key": "K01", "support_write_index": 3, "writes_since_support": 0},
    ],
    "query_events": [
        {
            "query_index": 0,
            "step_index": 4,
            "key": "K00",
            "answer_value": "V002",
            "support_write_index": 2,
            "slot_after_write": 3,
            "writes_since_support": 1,
            "tokens_since_support": 6,
            "answer_pair_type": "heldout",
            "positions": {"op": 13, "key": 14, "answer": 15},
            "support_positions": {"op": 7, "key": 8, "value": 9},
        },
        {
            "query_index": 1,
            "step_index": 5,
            "key": "K01",
            "answer_value": "V003",
            "support_write_index": 3,
            "slot_after_write": 3,
            "writes_since_support": 0,
            "tokens_since_support": 6,
            "answer_pair_type": "seen",
            "positions": {"op": 16, "key": 17, "answer": 18},
            "support_positions": {"op": 10, "key": 11, "value": 12},
        },
    ],
}


def check(record):
    return check_record(record, VOCABULARY, HELDOUT, "x.jsonl:7", split="x")


def test_sound_record():
    """A record written out by hand is sound; numbers of equal value take the form of whole numbers."""
    checked = check(RECORD)
    assert {name: checked[name] for name in RECORD} == RECORD and len(checked["steps"]) == 6
    odd = copy.deepcopy(RECORD) | {"note": [1.5, "kept"], "latent_program_signature": "another program's"}
    odd["query_plan"][0]["slot_after_write"], odd["query_events"][0]["comment"] = 3.0, "no matter"
    checked = check(odd)
    assert type(checked["query_plan"][0]["slot_after_write"]) is int
    assert checked["note"] == [1.5, "kept"] and checked["latent_program_signature"] == "another program's"


def put(path, value):
    """Makes an edit that sets the field at a path of names and indices."""

    def edit(record):
        for part in path[:-1]:
            record = record[part]
        record[path[-1]] = value

    return edit


DAMAGE = [
    (put(["split"], "nosuch"), "a record of split x; found nosuch"),
    (put(["split"], 3), "a text split; found int"),
    (lambda r: r.pop("sample_id"), "a text sample_id; found none"),
    (put(["tokens"], "W K00"), "tokens, a list of texts; found W K00"),
    (put(["tokens", 3], ["V000"]), "tokens, a list of texts; found"),
    (put(["tokens", 3], 12), "tokens, a list of texts; found"),
    (put(["tokens", 3], "V777"), "tokens of the benchmark's vocabulary; found V777"),
    (put(["tokens", 1], "="), "W or R at position 1; found ="),
    (put(["tokens", 3], "K01"), "a key and a value after position 1; found K00 K01"),
    (put(["tokens", 15], "V000"), "the read at position 13 to return V002; found V000"),
    (lambda r: r["tokens"].pop(), "<eos>; found 19 tokens"),
    (put(["tokens"], ["<bos>", "W", "K00", "V000", "<eos>"]), "at least one read; found none"),
    (put(["token_ids", 3], 13), r"token_ids\[3\] to be 12, as the tokens give it; found 13"),
    (put(["token_ids"], []), r"token_ids\[0\] to be 1, as the tokens give it; found none"),
    (put(["axes", "active_keys"], 3), "axes.active_keys to be 2, as the tokens give it; found 3"),
    (put(["axes", "mean_query_lag"], float("inf")), "axes.mean_query_lag to be 0, as the tokens give it; found inf"),
    (put(["axes", "max_query_lag"], float("nan")), "axes.max_query_lag to be 1, as the tokens give it; found nan"),
    (put(["axes"], []), "axes to be .*, as the tokens give it; found"),
    (lambda r: r["writes"][0].pop("key"), r"writes\[0\].key to be K00, as the tokens give it; found none"),
    (lambda r: r["writes"][0].pop("value"), r"writes\[0\].value to be V000, as the tokens give it; found none"),
    (put(["writes", 1], "W"), r"writes\[1\] to be .*; found W"),
    (put(["query_plan", 0], 3), r"query_plan\[0\] to be .*; found 3"),
    (put(["query_plan", 0, "slot_after_write"], 2), r"query_plan\[0\].slot_after_write to be 3, .*; found 2"),
    (lambda r: r["query_plan"].reverse(), r"query_plan\[0\].key to be K00, .*; found K01"),
    (lambda r: r["query_events"].append(r["query_events"][0]), r"query_events\[2\] to be none, .*; found"),
    (lambda r: r["query_events"].pop(), r"query_events\[1\] to be .*; found none"),
    (put(["query_events", 0, "support_positions", "value"], 3), r"support_positions.value to be 9, .*; found 3"),
    (put(["query_events", 1, "answer_value"], "V001"), r"query_events\[1\].answer_value to be V003, .*; found V001"),
    (put(["query_events", 1, "answer_pair_type"], "heldout"), "answer_pair_type to be seen, .*; found heldout"),
    (put(["exact_sequence_signature"], "other"), "exact_sequence_signature to be .*; found other"),
    (put(["counterfactual_of"], 3), "counterfactual_of to be the sample_id .*; found 3"),
    (put(["changed_write_index"], 4), "changed_write_index to be null or below 4; found 4"),
    (put(["note"], float("nan")), "finite numbers; found"),
    (lambda r: r.pop("query_plan"), "a benchmark record with query_plan; found none"),
]


@pytest.mark.parametrize(("edit", "complaint"), DAMAGE)
def test_damaged_record(edit, complaint):
    """Each kind of damage is refused with the file, the line and the place in the record."""
    record = copy.deepcopy(RECORD)
    edit(record)
    with pytest.raises(InputError, match=r"^x\.jsonl:7: expected .*" + complaint):
        check(record)


COUNTERFACTUAL = "<bos> W K00 V000 W K01 V001 W K00 V004 W K01 V003 R K00 V004 R K01 V003 <eos>"


def of_tokens(stream, **fields):
    """Builds a record of other tokens, by the function whose result `test_sound_record` compares with one by hand."""
    tokens = stream.split()
    writes = tuple((tokens[at + 1], tokens[at + 2]) for at in range(1, len(tokens) - 1, 3) if tokens[at] == "W")
    program = Program(writes, (Read(3, "K00", 2), Read(3, "K01", 3)))
    return build_record(program, VOCABULARY, heldout_pairs=HELDOUT, **{"sample_id": "c_0", "split": "c"} | fields)


def test_counterfactual():
    """A counterfactual is its source with one value changed, in the write that it names."""
    changed = of_tokens(COUNTERFACTUAL, counterfactual_of="x_0", changed_write_index=2)
    assert changed["tokens"] == COUNTERFACTUAL.split()
    check_counterfactual(changed, RECORD, "c.jsonl:1")
    for record, found in (
        (changed | {"changed_write_index": 1}, "with write 1 changed; found write 2"),
        (of_tokens(STREAM), "found 0 changed writes"),
        (of_tokens(COUNTERFACTUAL.replace("K01 V001", "K01 V002")), "found 2 changed writes"),
        (changed | {"query_plan": RECORD["query_plan"][:1]}, "the same reads; found 1 changed writes"),
        (changed | {"writes": [*RECORD["writes"][:3], RECORD["writes"][0]]}, "found other keys"),
    ):
        with pytest.raises(InputError, match=r"^c\.jsonl:1: expected c_0 to be x_0 .*" + found):
            check_counterfactual(record, RECORD, "c.jsonl:1")


def edit_line(path, number, edit):
    """Edits the document in a line of a file."""
    documents = read_lines(path)
    edit(documents[number - 1])
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))


@pytest.fixture
def benchmark(small_benchmark, tmp_path):
    return shutil.copytree(small_benchmark, tmp_path / "benchmark")


@pytest.mark.parametrize("split", ["validation_iid", "heldout_pairs", "counterfactual", "train"])
def test_probe_set_of_a_damaged_split(benchmark, tmp_path, capsys, split):
    """A damaged record anywhere in a split keeps a probe set from being frozen, chosen or not."""
    path = benchmark / f"{split}.jsonl"
    edit_line(path, 9, lambda record: record["writes"][0].pop("key"))
    flags = [f"--benchmark_dir={benchmark}", f"--output={tmp_path / 'probe.jsonl'}", "--examples_per_split=4"]
    line = refused(capsys, "generate-probe-set", *flags)
    assert f"{path}:9: expected writes[0].key to be K0" in line and "found none" in line
    assert not list(tmp_path.glob("probe*")), "nothing is left behind"


def test_record_that_stands_twice(benchmark):
    """A record that stands twice is refused with both lines."""
    path = benchmark / "test_iid.jsonl"
    first = read_lines(path)[0]
    edit_line(path, 5, lambda record: record.update(first))
    with pytest.raises(InputError, match=r"test_iid.jsonl:5: expected a sample_id of its own; .*, that of line 1"):
        Benchmark.open(benchmark).read_split("test_iid")


@pytest.mark.parametrize("file", ["probe.jsonl", "probe.fit.jsonl", "probe.sources.jsonl"])
def test_damaged_record_of_a_probe_set(small_benchmark, tmp_path, file):
    """A probe set that was frozen with a damaged record is refused with the file and the line."""
    benchmark = Benchmark.open(small_benchmark)
    path = tmp_path / "probe.jsonl"
    generate_probe_set(benchmark, path, examples_per_split=4, fit_examples=8, seed=1)
    manifest = tmp_path / "probe.metadata.json"
    edit_line(tmp_path / file, 2, lambda record: record["query_plan"][0].update(key=3))
    refreeze(manifest, tmp_path)
    with pytest.raises(InputError, match=rf"{file}:2: expected query_plan\[0\].key to be K0"):
        open_probe_set(path, benchmark)


def refreeze(manifest, folder):
    """Gives a probe set's manifest the hashes of its files as they are now."""
    document = json.loads(manifest.read_text())
    for name, ending in (("records", ""), ("fit", ".fit"), ("sources", ".sources")):
        document[f"{name}_sha256"] = hashlib.sha256((folder / f"probe{ending}.jsonl").read_bytes()).hexdigest()
    del document["content_sha256"]
    content = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps(document | {"content_sha256": content}))
