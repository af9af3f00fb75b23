"""Pair sets: which pairs a probe set gives, files that are immutable, and pairs as arrays."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from kvjax.errors import InputError
from kvjax.task.benchmark import Benchmark
from kvjax.task.corruption import PAIR_KINDS, PAIR_ROLES
from kvjax.task.encoding import NO_ROLE, bucket_by_length
from kvjax.task.pair_encoding import bucket_by_last_affected, bucket_by_window, encode_pairs
from kvjax.task.pairs import check_pair, generate_pairs, open_pairs, own_pairs
from kvjax.task.probe_set import generate_probe_set, install_probe_set, open_probe_set
from kvjax.task.stream import replay
from tests.helpers.building import read_lines


@pytest.fixture(scope="module")
def benchmark(small_benchmark):
    return Benchmark.open(small_benchmark)


def make_probe(benchmark, path, *, seed=17):
    return generate_probe_set(benchmark, path, examples_per_split=10, fit_examples=8, seed=seed)


def beside(probe, ending):
    """Returns the file of a probe set with an ending."""
    return probe.path.parent / f"{probe.path.stem}{ending}"


@pytest.fixture
def probe(benchmark, tmp_path):
    return make_probe(benchmark, tmp_path / "probe.jsonl")


@pytest.fixture(scope="module")
def made(benchmark, tmp_path_factory):
    """A pair set that tests only read."""
    probe = make_probe(benchmark, tmp_path_factory.mktemp("pairs") / "probe.jsonl")
    return probe, generate_pairs(probe, benchmark, pairs_per_kind=24, seed=5)


def test_spread_of_pairs(made):
    """Each kind has the number of pairs asked for, spread over the splits."""
    probe, pair_set = made
    assert [pair.kind for pair in pair_set.pairs] == [kind for kind in PAIR_KINDS for _ in range(24)]
    for kind in PAIR_KINDS:
        assert pair_set.manifest.pair_counts[kind] == dict.fromkeys(probe.manifest.splits, 6)
        pairs = pair_set.of_kind(kind)
        assert sum(read.answer_changes for p in pairs for read in p.reads) == pair_set.manifest.affected_reads[kind]
    # Changing a value breaks no rule, so six of a split's ten records or more give one each.
    assert len({pair.clean_id for pair in pair_set.of_kind("value") if pair.split != "counterfactual"}) == 18
    assert len({pair.pair_id for pair in pair_set.pairs}) == len(pair_set.pairs)
    assert len({(p.kind, *p.clean_tokens, *p.corrupted_tokens) for p in pair_set.pairs}) == len(pair_set.pairs)


def value_position_of_changed_write(record):
    writes = [step for step in record["steps"] if step["op"] == "write"]
    return writes[record["changed_write_index"]]["positions"]["value"]


def test_sources_of_pairs(made, small_benchmark):
    """Clean streams are probe records; value pairs of counterfactuals are the benchmark's own."""
    probe, pair_set = made
    records = {record["sample_id"]: record for record in probe.records}
    sources = {record["sample_id"]: record for record in read_lines(small_benchmark / "test_iid.jsonl")}
    for pair in pair_set.pairs:
        if pair.kind == "value" and pair.split == "counterfactual":
            altered = records[pair.corrupted_id]
            assert pair.corrupted_tokens == altered["tokens"] and pair.clean_id == altered["counterfactual_of"]
            assert pair.clean_tokens == sources[pair.clean_id]["tokens"]
            assert pair.changed_inputs == [value_position_of_changed_write(altered)]
        else:
            assert pair.corrupted_id is None
            assert pair.clean_tokens == records[pair.clean_id]["tokens"]
            assert pair.split == records[pair.clean_id]["split"]


def test_heldout_pairs(made, benchmark):
    """Corrupted streams write held-out pairs in the held-out split alone."""
    for pair in made[1].pairs:
        stream = pair.corrupted_tokens
        written = [f"{stream[at + 1]}:{stream[at + 2]}" for at in range(1, len(stream) - 1, 3) if stream[at] == "W"]
        if pair.split != "heldout_pairs":
            assert not benchmark.holdout_pairs.intersection(written)
        elif pair.kind in ("value", "query"):
            assert benchmark.holdout_pairs.issuperset(written)


def test_too_few_records(probe, benchmark):
    """If records run out there are fewer pairs, and the manifest counts them."""
    pair_set = generate_pairs(probe, benchmark, pairs_per_kind=100_000)
    reads = sum(len(record["query_events"]) for record in probe.records)
    assert sum(pair_set.manifest.pair_counts["query"].values()) == len(pair_set.of_kind("query")) == reads
    counterfactuals = [pair for pair in pair_set.of_kind("value") if pair.split == "counterfactual"]
    assert len(counterfactuals) == len(probe.sources)
    assert len({(p.kind, *p.clean_tokens, *p.corrupted_tokens) for p in pair_set.pairs}) == len(pair_set.pairs)


def test_choice_of_pairs(made, benchmark, tmp_path):
    """The choice of pairs depends on the probe set's content and the seed alone."""
    probe = make_probe(benchmark, tmp_path / "elsewhere" / "copy.jsonl")
    again = generate_pairs(probe, benchmark, pairs_per_kind=24, seed=5)
    assert again.manifest == made[1].manifest and again.pairs == made[1].pairs
    second = make_probe(benchmark, tmp_path / "second.jsonl")
    assert generate_pairs(second, benchmark, pairs_per_kind=24, seed=6).pairs != again.pairs


def test_opening_pairs(probe, benchmark):
    """Pairs open as they were made, and are not written again."""
    with pytest.raises(InputError, match="no such file"):
        open_pairs(probe, benchmark)
    pair_set = generate_pairs(probe, benchmark, pairs_per_kind=4)
    assert open_pairs(probe, benchmark) == pair_set == own_pairs(probe, benchmark)
    with pytest.raises(InputError, match="immutable"):
        generate_pairs(probe, benchmark, pairs_per_kind=4)


@pytest.mark.parametrize("edit", [("V0", "V1"), ('"between"', '"before"'), ('"split"', '"splat"')])
def test_edited_pairs(probe, benchmark, edit):
    """Edited pairs are refused."""
    path = generate_pairs(probe, benchmark, pairs_per_kind=4).path
    path.write_text(path.read_text().replace(*edit, 1))
    with pytest.raises(InputError, match="edited"):
        open_pairs(probe, benchmark)


def test_edited_manifest(probe, benchmark):
    """An edited manifest is refused."""
    generate_pairs(probe, benchmark, pairs_per_kind=4)
    path = beside(probe, ".pairs.metadata.json")
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"seed": 99}))
    with pytest.raises(InputError, match="edited"):
        open_pairs(probe, benchmark)
    path.write_text(json.dumps({"kvjax_pairs": 1}))
    with pytest.raises(InputError, match="manifest of a pair set"):
        open_pairs(probe, benchmark)


def test_pairs_of_another_probe_set(probe, benchmark, tmp_path):
    """Pairs of another probe set are refused."""
    pair_set = generate_pairs(probe, benchmark, pairs_per_kind=4)
    other = make_probe(benchmark, tmp_path / "other" / "probe.jsonl", seed=18)
    beside(other, ".pairs.jsonl").write_bytes(pair_set.path.read_bytes())
    beside(other, ".pairs.metadata.json").write_bytes(beside(probe, ".pairs.metadata.json").read_bytes())
    with pytest.raises(InputError, match=r"remove this file .*; found another probe set's") as refused:
        open_pairs(other, benchmark)
    Path(str(refused.value).split(": ")[0]).unlink()  # as it says
    assert own_pairs(other, benchmark).manifest.probe_set_sha256 == other.manifest.content_sha256


def test_replaced_probe_set(probe, benchmark, tmp_path):
    """Replacing a run's probe set removes its pairs."""
    analysis = tmp_path / "analysis"
    for chosen in (probe, make_probe(benchmark, tmp_path / "other" / "probe.jsonl", seed=18)):
        install_probe_set(chosen, analysis / "probe_set.jsonl")
        pair_set = own_pairs(open_probe_set(analysis / "probe_set.jsonl", benchmark), benchmark)
        assert pair_set.manifest.probe_set_sha256 == chosen.manifest.content_sha256


def test_interrupted_pairs(probe, benchmark):
    """Pairs without a manifest are made anew."""
    first = own_pairs(probe, benchmark)
    beside(probe, ".pairs.metadata.json").unlink()
    assert own_pairs(probe, benchmark) == first


def test_no_pairs(probe, benchmark):
    """Asking for no pairs, or for pairs that cannot exist, is refused."""
    with pytest.raises(InputError, match="pairs_per_kind: expected at least 1"):
        generate_pairs(probe, benchmark, pairs_per_kind=0)
    with pytest.raises(InputError, match="allow a pair of kind value; found none"):
        generate_pairs(dataclasses.replace(probe, records=()), benchmark)
    assert not beside(probe, ".pairs.jsonl").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clean_token_ids", []),
        ("changed_inputs", [1]),
        ("position_roles", []),
        ("corrupted_tokens", ["<bos>", "<eos>"]),
        ("target_read", 77),
    ],
)
def test_contradicted_pair(made, benchmark, field, value):
    """A pair that the replay of its streams contradicts is refused."""
    pair = made[1].pairs[0]
    check_pair(pair, benchmark.vocabulary, "here")
    with pytest.raises(InputError, match="here: expected"):
        check_pair(pair.model_copy(update={field: value}), benchmark.vocabulary, "here")


def test_encoded_pairs(made, benchmark):
    """The arrays of encoded pairs hold what the pairs say."""
    pairs = made[1].pairs
    encoded = encode_pairs(pairs, benchmark.vocabulary, max_seq_len=64)
    id_of = benchmark.vocabulary.id_of
    for n, pair in enumerate(pairs):
        size = len(pair.clean_tokens)
        assert encoded.lengths[n] == size
        assert encoded.clean_tokens[n, :size].tolist() == [id_of[token] for token in pair.clean_tokens]
        assert encoded.corrupted_tokens[n, :size].tolist() == [id_of[token] for token in pair.corrupted_tokens]
        assert not encoded.clean_tokens[n, size:].any() and not encoded.corrupted_tokens[n, size:].any()
        assert PAIR_KINDS[encoded.kinds[n]] == pair.kind
        reads = replay(pair.clean_tokens)
        assert encoded.is_read[n].sum() == len(reads)
        affected = []
        for q, (before, after) in enumerate(zip(reads, replay(pair.corrupted_tokens), strict=True)):
            assert encoded.prediction_positions[n, q] == before.answer_position - 1
            assert encoded.clean_answers[n, q] == id_of[before.answer]
            assert encoded.corrupted_answers[n, q] == id_of[after.answer]
            assert encoded.is_affected[n, q] == (before.answer != after.answer)
            affected += [before.answer_position - 1] if before.answer != after.answer else []
        assert encoded.is_target[n].sum() == 1 and (encoded.is_affected[n] | ~encoded.is_target[n]).all()
        last = encoded.last_affected[n]
        assert last == max(affected)
        differing = np.flatnonzero(encoded.clean_tokens[n, : last + 1] != encoded.corrupted_tokens[n, : last + 1])
        assert np.flatnonzero(encoded.is_changed[n]).tolist() == differing.tolist()
        assert encoded.first_changed[n] == differing[0]
        roles = [PAIR_ROLES[role] if role != NO_ROLE else None for role in encoded.roles[n]]
        assert roles[:size] == pair.position_roles and set(roles[size:]) <= {None}


def test_buckets_of_pairs(made, benchmark):
    """Encoded pairs are a pytree and fall into buckets by length."""
    encoded = encode_pairs(made[1].pairs, benchmark.vocabulary, max_seq_len=64)
    assert len(jax.tree.leaves(jax.tree.map(lambda leaf: leaf + 0, encoded))) == len(dataclasses.fields(encoded))
    buckets = bucket_by_length(encoded, tokens_per_batch=300)
    real = np.concatenate([bucket.indices[bucket.indices >= 0] for bucket in buckets])
    assert sorted(real.tolist()) == list(range(len(encoded)))
    assert sum(bucket.batches.weights.sum() for bucket in buckets) == len(encoded)


def test_streams_until_the_last_affected_read(made, benchmark):
    """Tokens and reads after the last affected one are dropped; everything before stays."""
    whole = encode_pairs(made[1].pairs, benchmark.vocabulary, max_seq_len=64)
    cut = whole.until_last_affected()
    assert (cut.lengths == whole.last_affected + 1).all() and (cut.lengths < whole.lengths).any()
    for n, last in enumerate(whole.last_affected):
        for name in ("clean_tokens", "corrupted_tokens"):
            kept, all_tokens = getattr(cut, name)[n], getattr(whole, name)[n]
            assert (kept[: last + 1] == all_tokens[: last + 1]).all() and not kept[last + 1 :].any()
        reads = whole.is_read[n] & (whole.prediction_positions[n] <= last)
        assert (cut.is_read[n] == reads).all() and (cut.is_affected[n] <= reads).all()
        assert (cut.prediction_positions[n][reads] == whole.prediction_positions[n][reads]).all()


def test_affected_reads_alone(made, benchmark):
    """A pair's affected reads come first, in order and with all that belongs to them; no other read is left."""
    whole = encode_pairs(made[1].pairs, benchmark.vocabulary, max_seq_len=64)
    alone = whole.at_affected_reads()
    assert (whole.is_read & ~whole.is_affected).any()
    for n, affected in enumerate(whole.is_affected):
        count = int(affected.sum())
        for name in ("is_read", "is_target", "prediction_positions", "support_positions", "corrupted_answers"):
            found, wanted = getattr(alone, name)[n], getattr(whole, name)[n][affected]
            assert found.dtype == wanted.dtype and (found[:count] == wanted).all() and not found[count:].any()
        assert alone.is_affected[n].sum() == count


@pytest.mark.parametrize("bucket", [bucket_by_window, bucket_by_last_affected])
@pytest.mark.parametrize("sizes", [1, 2, 4])
def test_sizes_that_pairs_are_padded_to(made, benchmark, bucket, sizes):
    """Every pair falls into one bucket, whose window reaches from its change to its last affected read."""
    encoded = encode_pairs(made[1].pairs, benchmark.vocabulary, max_seq_len=64)
    buckets = bucket(encoded, tokens_per_batch=300, max_buckets=sizes)
    assert len(buckets) == sizes
    found = []
    for own in buckets:
        rows = own.indices[own.indices >= 0]
        assert (encoded.last_affected[rows] - encoded.first_changed[rows] < own.window).all()
        assert own.batches.clean_tokens.shape[-1] == encoded.last_affected[rows].max() + 1
        found += rows.tolist()
    assert sorted(found) == list(range(len(encoded)))


def test_too_long_pairs(made, benchmark):
    """Pairs longer than the model's context, and an empty list of pairs, are refused."""
    with pytest.raises(InputError, match="expected at most max_seq_len 16 tokens"):
        encode_pairs(made[1].pairs, benchmark.vocabulary, max_seq_len=16)
    with pytest.raises(InputError, match="at least one"):
        encode_pairs([], benchmark.vocabulary, max_seq_len=64)
