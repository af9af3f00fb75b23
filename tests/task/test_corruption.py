"""Corrupted streams are streams of the task, changed as their kind says; roles, by hand and for random streams."""

import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvjax.errors import InputError
from kvjax.task.corruption import PAIR_KINDS, corrupt, difference
from kvjax.task.stream import Program, Read, build_record, replay
from kvjax.task.vocabulary import Vocabulary

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
        """A value pair writes another value at the support."""
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
        """A query pair asks for another key."""
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
        """A swap pair exchanges the keys of the support and of another write."""
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
        """A stale pair gives the support another key, so that an older value of the key is current."""
        stream, found = self.pair("stale", 2)
        assert stream == ("<bos> W K00 V000 W K01 V001 W K01 V002 R K00 V000 W K01 V003 R K01 V003 R K00 V000 <eos>")
        assert (found.input_positions, found.answer_positions) == ((8,), (12,))
        assert [read.corrupted_answer for read in found.reads] == ["V000", "V003", "V000"]

    def test_reads_of_the_new_key(self):
        """A later read of the key that a write was moved to is affected too."""
        # R K01 after the re-keyed write returns its value instead of V001.
        program = Program((("K00", "V000"), ("K01", "V001"), ("K00", "V002")), (Read(2, "K01", 1), Read(2, "K00", 2)))
        found = difference(tokens_of(program), tokens_of(corrupted("stale", program, 1)))
        assert [(read.clean_answer, read.corrupted_answer) for read in found.reads] == [
            ("V001", "V002"),
            ("V002", "V000"),
        ]

    def test_read_without_a_write(self):
        """A change that would leave a read without a write of its key gives no pair."""
        # The exchange would take K01's only write before its read away.
        program = Program((("K00", "V000"), ("K01", "V001"), ("K00", "V002")), (Read(1, "K01", 1), Read(2, "K00", 2)))
        assert corrupted("swap", program, 1) is None

    def test_first_write(self):
        """A key that was written once has no stale value, and gives no stale pair."""
        program = Program((("K00", "V000"), ("K01", "V001")), (Read(1, "K00", 0),))
        assert corrupted("stale", program, 0) is None

    def test_one_key_alone(self):
        """A stream of one key gives neither query nor swap pairs."""
        program = Program((("K00", "V000"), ("K00", "V001")), (Read(1, "K00", 1),))
        assert [corrupted(kind, program, 0) for kind in ("query", "swap", "stale")] == [None] * 3

    def test_preference_for_overwritten_keys(self):
        """A query pair asks for an overwritten key if there is one."""
        # K02 was written once; reads of the benchmark never ask for such a key.
        writes = (("K00", "V000"), ("K01", "V001"), ("K02", "V002"), ("K01", "V003"), ("K00", "V004"))
        program = Program(writes, (Read(4, "K00", 4),))
        assert {corrupted("query", program, 0, seed=seed).reads[0].key for seed in range(20)} == {"K01"}

    def test_count_of_broken_rules(self):
        """Each rule of the benchmark that a corrupted stream breaks is counted."""

        def broken(kind, read_index, lags):
            settings = {"vocabulary": VOCABULARY, "heldout_pairs": frozenset(), "split": "x", "rng": random.Random(0)}
            return corrupt(kind, BY_HAND, read_index, lags=frozenset(lags), **settings).broken_rules

        assert broken("value", 0, (0, 1)) == 0
        assert broken("value", 0, (1,)) == 2  # reads 0 and 1 ask for the write just before
        # Keys written: K00 K01 K01 K01, two repeats. Reads 0 and 2 ask for K00, written once, at lags 2 and 3.
        assert broken("stale", 2, range(4)) == 2 + 2
        assert broken("stale", 2, (0, 1)) == 2 + 2 + (1 + 2)

    def test_preference_for_usual_lags(self):
        """A query pair asks for a key at a lag of the benchmark if there is one."""
        keys = ("K00", "K01", "K02", "K00", "K02", "K01", "K00")
        program = Program(tuple((key, f"V{i:03d}") for i, key in enumerate(keys)), (Read(6, "K00", 6),))
        asked = {corrupted("query", program, 0, lags=(0, 2), seed=seed).reads[0].key for seed in range(20)}
        assert asked == {"K02"}

    def test_heldout_pairs(self):
        """Corruptions write held-out pairs in the held-out split alone."""
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
def test_corrupted_streams(program, kind, read_index, seed):
    """Any corrupted stream differs from its clean one exactly as its kind says."""
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
def test_roles_of_positions(program, kind, read_index, seed):
    """The changed positions and the role of each position follow from the two token rows."""
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
def test_invalid_pairs(clean, other, complaint):
    """Two streams that are no pair are refused."""
    with pytest.raises(InputError, match=complaint):
        difference(clean.split(), other.split())
