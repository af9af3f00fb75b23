"""Pairs: corrupted streams are streams of the task, changed as their kind says; roles by hand; files are immutable."""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvjax.errors import InputError
from kvjax.task.benchmark import Benchmark
from kvjax.task.corruption import PAIR_KINDS, PAIR_ROLES, corrupt, difference
from kvjax.task.encoding import NO_ROLE, bucket_by_length
from kvjax.task.pair_encoding import encode_pairs
from kvjax.task.pairs import check_pair, generate_pairs, open_pairs, own_pairs
from kvjax.task.probe_set import generate_probe_set, install_probe_set, open_probe_set, pairs_manifest_path, pairs_path
from kvjax.task.stream import Program, Read, build_record, replay
from kvjax.task.vocabulary import Vocabulary
from tests.building import read_lines

VOCABULARY = Vocabulary.of_size(4, 30)


def tokens_of(program):
    return build_record(program, VOCABULARY, sample_id="x", split="x", heldout_pairs=frozenset())["tokens"]


def corrupted(
    kind, program, read_index, *, split="x", heldout_pairs=frozenset(), vocabulary=VOCABULARY, lags=range(20), seed=0
):
    found = corrupt(
        kind,
        program,
        read_index,
        vocabulary=vocabulary,
        heldout_pairs=heldout_pairs,
        split=split,
        lags=frozenset(lags),
        rng=random.Random(seed),
    )
    return found and found.program


# 1 W K00 V000 | 4 W K01 V001 | 7 W K00 V002 | 10 R K00 V002 | 13 W K01 V003 | 16 R K01 V003 | 19 R K00 V002
BY_HAND = Program(
    (("K00", "V000"), ("K01", "V001"), ("K00", "V002"), ("K01", "V003")),
    (Read(2, "K00", 2), Read(3, "K01", 3), Read(3, "K00", 2)),
)


class TestByHand:
    def pair(self, kind, read_index, **changes):
        stream = tokens_of(corrupted(kind, BY_HAND, read_index, **changes))
        return " ".join(stream), difference(tokens_of(BY_HAND), stream)

    def test_value(self):
        # Only V004 is left to write.
        stream, found = self.pair("value", 0, vocabulary=Vocabulary.of_size(4, 5))
        assert stream == ("<bos> W K00 V000 W K01 V001 W K00 V004 R K00 V004 W K01 V003 R K01 V003 R K00 V004 <eos>")
        assert [read.is_affected for read in found.reads] == [True, False, True]
        assert (found.input_positions, found.answer_positions) == ((9,), (12,))
        assert found.roles == (
            *["before"] * 9,
            "changed",  # the value of the write
            "operator",  # of the first read
            "prediction",
            "earlier_answers",  # its answer, which the last read can copy
            *["between"] * 6,  # a write, and a read that is not affected
            "operator",
            "prediction",
            None,
            None,
        )

    def test_query(self):
        stream, found = self.pair("query", 1)
        assert stream == ("<bos> W K00 V000 W K01 V001 W K00 V002 R K00 V002 W K01 V003 R K00 V002 R K00 V002 <eos>")
        assert [(read.clean_answer, read.corrupted_answer) for read in found.reads] == [
            ("V002", "V002"),
            ("V003", "V002"),
            ("V002", "V002"),
        ]
        assert (found.input_positions, found.answer_positions) == ((17,), ())
        assert found.roles == (*["before"] * 17, "prediction", *[None] * 5)

    def test_swap(self):
        # Before read 0 only the write of V001 can exchange keys with the support. The last read comes after the
        # last write of K01, so read 1 keeps its answer.
        stream, found = self.pair("swap", 0)
        assert stream == ("<bos> W K00 V000 W K00 V001 W K01 V002 R K00 V001 W K01 V003 R K01 V003 R K00 V001 <eos>")
        assert [read.is_affected for read in found.reads] == [True, False, True]
        assert (found.input_positions, found.answer_positions) == ((5, 8), (12,))
        assert found.roles[:13] == (
            *["before"] * 5,
            "changed",
            "between",
            "between",
            "changed",
            "between",
            "operator",
            "prediction",
            "earlier_answers",
        )

    def test_stale(self):
        stream, found = self.pair("stale", 2)
        assert stream == ("<bos> W K00 V000 W K01 V001 W K01 V002 R K00 V000 W K01 V003 R K01 V003 R K00 V000 <eos>")
        assert (found.input_positions, found.answer_positions) == ((8,), (12,))
        assert [read.corrupted_answer for read in found.reads] == ["V000", "V003", "V000"]

    def test_a_read_of_the_writes_new_key_is_affected_too(self):
        # R K01 after the re-keyed write returns its value instead of V001.
        program = Program((("K00", "V000"), ("K01", "V001"), ("K00", "V002")), (Read(2, "K01", 1), Read(2, "K00", 2)))
        found = difference(tokens_of(program), tokens_of(corrupted("stale", program, 1)))
        assert [(read.clean_answer, read.corrupted_answer) for read in found.reads] == [
            ("V001", "V002"),
            ("V002", "V000"),
        ]

    def test_a_corruption_that_leaves_a_read_without_a_write_is_none(self):
        # The exchange would take K01's only write before its read away.
        program = Program((("K00", "V000"), ("K01", "V001"), ("K00", "V002")), (Read(1, "K01", 1), Read(2, "K00", 2)))
        assert corrupted("swap", program, 1) is None

    def test_a_first_write_has_no_stale_value(self):
        program = Program((("K00", "V000"), ("K01", "V001")), (Read(1, "K00", 0),))
        assert corrupted("stale", program, 0) is None

    def test_one_key_alone_has_no_other_to_ask_for_or_exchange_with(self):
        program = Program((("K00", "V000"), ("K00", "V001")), (Read(1, "K00", 1),))
        assert [corrupted(kind, program, 0) for kind in ("query", "swap", "stale")] == [None] * 3

    def test_an_overwritten_key_is_asked_for_where_there_is_one(self):
        # K02 was written once; reads of the benchmark never ask for such a key.
        writes = (("K00", "V000"), ("K01", "V001"), ("K02", "V002"), ("K01", "V003"), ("K00", "V004"))
        program = Program(writes, (Read(4, "K00", 4),))
        assert {corrupted("query", program, 0, seed=seed).reads[0].key for seed in range(20)} == {"K01"}

    def test_the_rules_broken_are_counted(self):
        def broken(kind, read_index, lags):
            settings = {"vocabulary": VOCABULARY, "heldout_pairs": frozenset(), "split": "x", "rng": random.Random(0)}
            return corrupt(kind, BY_HAND, read_index, lags=frozenset(lags), **settings).broken_rules

        assert broken("value", 0, (0, 1)) == 0
        assert broken("value", 0, (1,)) == 2  # reads 0 and 1 ask for the write just before
        # Keys written: K00 K01 K01 K01, two repeats. Reads 0 and 2 ask for K00, written once, at lags 2 and 3.
        assert broken("stale", 2, range(4)) == 2 + 2
        assert broken("stale", 2, (0, 1)) == 2 + 2 + (1 + 2)

    def test_a_key_at_a_usual_lag_is_asked_for_where_there_is_one(self):
        keys = ("K00", "K01", "K02", "K00", "K02", "K01", "K00")
        program = Program(tuple((key, f"V{i:03d}") for i, key in enumerate(keys)), (Read(6, "K00", 6),))
        asked = {corrupted("query", program, 0, lags=(0, 2), seed=seed).reads[0].key for seed in range(20)}
        assert asked == {"K02"}

    def test_held_out_pairs_stay_in_their_split(self):
        heldout = frozenset(("K00", f"V{value:03d}") for value in range(4, 10))
        seen = {corrupted("value", BY_HAND, 0, heldout_pairs=heldout, seed=s).writes[2][1] for s in range(200)}
        assert seen == {f"V{value:03d}" for value in range(10, 30)}
        inside = {
            corrupted("value", BY_HAND, 0, heldout_pairs=heldout, split="heldout_pairs", seed=s).writes[2]
            for s in range(100)
        }
        assert inside == heldout
        assert corrupted("swap", BY_HAND, 0, heldout_pairs=frozenset({("K01", "V002")})) is None


@st.composite
def programs(draw):
    """Any program with distinct values: keys in any order, reads of any key written."""
    num_keys = draw(st.integers(1, 4))
    keys = draw(st.lists(st.integers(0, num_keys - 1), min_size=1, max_size=10))
    values = draw(st.permutations(range(30)))[: len(keys)]
    writes = tuple((f"K{key:02d}", f"V{value:03d}") for key, value in zip(keys, values, strict=True))
    slots = sorted(draw(st.lists(st.integers(0, len(keys) - 1), min_size=1, max_size=6)))
    reads = []
    for slot in slots:
        support = draw(st.integers(0, slot))
        key = writes[support][0]
        reads.append(Read(slot, key, max(i for i in range(slot + 1) if writes[i][0] == key)))
    return Program(writes, tuple(reads))


def latest(stream, key, position):
    """Returns the value of the last write of `key` before `position`, by walking back."""
    return next(stream[p + 2] for p in range(position - 3, 0, -3) if stream[p] == "W" and stream[p + 1] == key)


@settings(max_examples=300, deadline=None)
@given(programs(), st.sampled_from(PAIR_KINDS), st.integers(0, 5), st.integers(0, 99))
def test_a_corrupted_stream_is_what_its_kind_says(program, kind, read_index, seed):
    read_index %= len(program.reads)
    altered = corrupted(kind, program, read_index, seed=seed)
    assume(altered is not None)
    clean, stream = tokens_of(program), tokens_of(altered)
    replay(stream)  # refuses what is no stream of the task
    assert len(stream) == len(clean) and stream[1:-1:3] == clean[1:-1:3]
    read, support = program.reads[read_index], program.reads[read_index].support_write_index
    old_key, old_value = program.writes[support]
    new_answer = altered.writes[altered.reads[read_index].support_write_index][1]
    assert new_answer != old_value
    changed = [i for i, (a, b) in enumerate(zip(program.writes, altered.writes, strict=True)) if a != b]
    new_values = {value for _, value in altered.writes}
    assert len(new_values) == len(altered.writes), "every value is written once"
    if kind == "value":
        assert changed == [support] and altered.writes[support] == (old_key, new_answer)
        assert new_answer not in {value for _, value in program.writes}
    elif kind == "query":
        assert not changed and altered.reads[read_index].key != read.key
        assert [r for i, r in enumerate(altered.reads) if i != read_index] == [
            r for i, r in enumerate(program.reads) if i != read_index
        ]
    elif kind == "swap":
        assert len(changed) == 2 and support in changed
        other = next(i for i in changed if i != support)
        assert altered.writes[other] == (old_key, program.writes[other][1])
        assert altered.writes[support] == (program.writes[other][0], old_value)
        assert new_answer == program.writes[other][1]
    else:
        assert changed == [support] and altered.writes[support][1] == old_value
        earlier = [value for key, value in program.writes[:support] if key == old_key]
        assert new_answer == earlier[-1]


@settings(max_examples=200, deadline=None)
@given(programs(), st.sampled_from(PAIR_KINDS), st.integers(0, 5), st.integers(0, 99))
def test_roles_and_changes_follow_from_the_tokens(program, kind, read_index, seed):
    read_index %= len(program.reads)
    altered = corrupted(kind, program, read_index, seed=seed)
    assume(altered is not None)
    clean, stream = tokens_of(program), tokens_of(altered)
    found = difference(clean, stream)
    read_ops = [at for at in range(1, len(clean) - 1, 3) if clean[at] == "R"]
    assert [read.prediction_position for read in found.reads] == [at + 1 for at in read_ops]
    for read in found.reads:
        p = read.prediction_position
        assert read.clean_answer == clean[p + 1] == latest(clean, clean[p], p - 1)
        assert read.corrupted_answer == stream[p + 1] == latest(stream, stream[p], p - 1)
    affected = [read.prediction_position for read in found.reads if read.clean_answer != read.corrupted_answer]
    assert found.reads[read_index].prediction_position in affected
    last = max(affected)
    differing = {p for p in range(last + 1) if clean[p] != stream[p]}
    assert set(found.input_positions) | set(found.answer_positions) == differing
    assert {p for p in differing if p - 1 in affected} == set(found.answer_positions)
    for position, role in enumerate(found.roles):
        assert (role is None) == (position > last)
        assert (role == "before") == (position < min(differing))
        assert (role == "prediction") == (position in affected)
        if role in ("changed", "earlier_answers"):
            assert position in differing
        elif role in ("between", "operator"):
            assert position not in differing
    if kind != "query":
        assert {p for p, role in enumerate(found.roles) if role == "operator"} == {p - 1 for p in affected}
        assert {p for p, role in enumerate(found.roles) if role == "changed"} == set(found.input_positions)
        assert {p for p, role in enumerate(found.roles) if role == "earlier_answers"} == set(found.answer_positions)


@pytest.mark.parametrize(
    ("clean", "other", "complaint"),
    [
        ("<bos> W K00 V000 R K00 V000 <eos>", "<bos> W K00 V000 <eos>", "same operators"),
        ("<bos> W K00 V000 R K00 V000 <eos>", "<bos> W K00 V000 W K00 V000 <eos>", "same operators"),
        ("<bos> W K00 V000 R K00 V000 <eos>", "<bos> W K00 V001 R K00 V000 <eos>", "to return V001"),
        ("<bos> W K00 V000 R K00 V000 <eos>", "<bos> W K01 V000 R K01 V000 <eos>", "whose answer changes"),
    ],
)
def test_what_is_no_pair_is_refused(clean, other, complaint):
    with pytest.raises(InputError, match=complaint):
        difference(clean.split(), other.split())


@pytest.fixture(scope="module")
def benchmark(small_benchmark):
    return Benchmark.open(small_benchmark)


def make_probe(benchmark, path, *, seed=17):
    return generate_probe_set(benchmark, path, examples_per_split=10, fit_examples=8, seed=seed)


@pytest.fixture
def probe(benchmark, tmp_path):
    return make_probe(benchmark, tmp_path / "probe.jsonl")


@pytest.fixture(scope="module")
def made(benchmark, tmp_path_factory):
    """A pair set that tests only read."""
    probe = make_probe(benchmark, tmp_path_factory.mktemp("pairs") / "probe.jsonl")
    return probe, generate_pairs(probe, benchmark, pairs_per_kind=24, seed=5)


def test_every_kind_has_its_pairs_spread_over_the_splits(made):
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


def test_clean_streams_are_records_and_counterfactuals_are_the_benchmarks_own(made, small_benchmark):
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


def test_held_out_pairs_are_written_in_their_split_alone(made, benchmark):
    for pair in made[1].pairs:
        stream = pair.corrupted_tokens
        written = [f"{stream[at + 1]}:{stream[at + 2]}" for at in range(1, len(stream) - 1, 3) if stream[at] == "W"]
        if pair.split != "heldout_pairs":
            assert not benchmark.holdout_pairs.intersection(written)
        elif pair.kind in ("value", "query"):
            assert benchmark.holdout_pairs.issuperset(written)


def test_when_records_run_out_there_are_fewer_pairs_and_the_manifest_says_so(probe, benchmark):
    pair_set = generate_pairs(probe, benchmark, pairs_per_kind=100_000)
    reads = sum(len(record["query_events"]) for record in probe.records)
    assert sum(pair_set.manifest.pair_counts["query"].values()) == len(pair_set.of_kind("query")) == reads
    counterfactuals = [pair for pair in pair_set.of_kind("value") if pair.split == "counterfactual"]
    assert len(counterfactuals) == len(probe.sources)
    assert len({(p.kind, *p.clean_tokens, *p.corrupted_tokens) for p in pair_set.pairs}) == len(pair_set.pairs)


def test_the_choice_depends_on_content_and_seed_alone(made, benchmark, tmp_path):
    probe = make_probe(benchmark, tmp_path / "elsewhere" / "copy.jsonl")
    again = generate_pairs(probe, benchmark, pairs_per_kind=24, seed=5)
    assert again.manifest == made[1].manifest and again.pairs == made[1].pairs
    second = make_probe(benchmark, tmp_path / "second.jsonl")
    assert generate_pairs(second, benchmark, pairs_per_kind=24, seed=6).pairs != again.pairs


def test_pairs_open_as_they_were_made_and_are_written_once(probe, benchmark):
    with pytest.raises(InputError, match="no such file"):
        open_pairs(probe, benchmark)
    pair_set = generate_pairs(probe, benchmark, pairs_per_kind=4)
    assert open_pairs(probe, benchmark) == pair_set == own_pairs(probe, benchmark)
    with pytest.raises(InputError, match="immutable"):
        generate_pairs(probe, benchmark, pairs_per_kind=4)


@pytest.mark.parametrize("edit", [("V0", "V1"), ('"between"', '"before"'), ('"split"', '"splat"')])
def test_edited_pairs_are_refused(probe, benchmark, edit):
    path = generate_pairs(probe, benchmark, pairs_per_kind=4).path
    path.write_text(path.read_text().replace(*edit, 1))
    with pytest.raises(InputError, match="edited"):
        open_pairs(probe, benchmark)


def test_an_edited_manifest_is_refused(probe, benchmark):
    generate_pairs(probe, benchmark, pairs_per_kind=4)
    path = pairs_manifest_path(probe.path)
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"seed": 99}))
    with pytest.raises(InputError, match="edited"):
        open_pairs(probe, benchmark)
    path.write_text(json.dumps({"kvjax_pairs": 1}))
    with pytest.raises(InputError, match="manifest of a pair set"):
        open_pairs(probe, benchmark)


def test_another_probe_sets_pairs_are_refused(probe, benchmark, tmp_path):
    pair_set = generate_pairs(probe, benchmark, pairs_per_kind=4)
    other = make_probe(benchmark, tmp_path / "other" / "probe.jsonl", seed=18)
    pairs_path(other.path).write_bytes(pair_set.path.read_bytes())
    pairs_manifest_path(other.path).write_bytes(pairs_manifest_path(probe.path).read_bytes())
    with pytest.raises(InputError, match="another probe set's"):
        open_pairs(other, benchmark)


def test_pairs_of_a_probe_set_that_is_replaced_go_with_it(probe, benchmark, tmp_path):
    analysis = tmp_path / "analysis"
    for chosen in (probe, make_probe(benchmark, tmp_path / "other" / "probe.jsonl", seed=18)):
        install_probe_set(chosen, analysis)
        pair_set = own_pairs(open_probe_set(analysis / "probe_set.jsonl", benchmark), benchmark)
        assert pair_set.manifest.probe_set_sha256 == chosen.manifest.content_sha256


def test_what_an_interruption_left_is_made_anew(probe, benchmark):
    first = own_pairs(probe, benchmark)
    pairs_manifest_path(probe.path).unlink()
    assert own_pairs(probe, benchmark) == first


def test_no_pairs_asked_for_and_none_possible_are_refused(probe, benchmark):
    with pytest.raises(InputError, match="pairs_per_kind: expected at least 1"):
        generate_pairs(probe, benchmark, pairs_per_kind=0)
    with pytest.raises(InputError, match="allow a pair of kind value; found none"):
        generate_pairs(dataclasses.replace(probe, records=()), benchmark)
    assert not pairs_path(probe.path).exists()


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
def test_a_pair_that_replay_contradicts_is_refused(made, benchmark, field, value):
    pair = made[1].pairs[0]
    check_pair(pair, benchmark.vocabulary, "here")
    with pytest.raises(InputError, match="here: expected"):
        check_pair(pair.model_copy(update={field: value}), benchmark.vocabulary, "here")


def test_arrays_hold_what_the_pairs_say(made, benchmark):
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


def test_encoded_pairs_are_a_pytree_and_fill_length_buckets(made, benchmark):
    encoded = encode_pairs(made[1].pairs, benchmark.vocabulary, max_seq_len=64)
    assert len(jax.tree.leaves(jax.tree.map(lambda leaf: leaf + 0, encoded))) == len(dataclasses.fields(encoded))
    buckets = bucket_by_length(encoded, tokens_per_batch=300)
    real = np.concatenate([bucket.indices[bucket.indices >= 0] for bucket in buckets])
    assert sorted(real.tolist()) == list(range(len(encoded)))
    assert sum(bucket.batches.weights.sum() for bucket in buckets) == len(encoded)


def test_too_long_and_no_pairs_are_named(made, benchmark):
    with pytest.raises(InputError, match="expected at most max_seq_len 16 tokens"):
        encode_pairs(made[1].pairs, benchmark.vocabulary, max_seq_len=16)
    with pytest.raises(InputError, match="at least one"):
        encode_pairs([], benchmark.vocabulary, max_seq_len=64)
