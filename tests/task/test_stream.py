"""Streams: the record's events are what replaying its tokens gives, and replaying refuses what is no stream."""

import pytest

from kvjax.errors import InputError
from kvjax.task.benchmark import heuristic_accuracies
from kvjax.task.stream import Program, Read, build_record, program_of, replay
from kvjax.task.vocabulary import Vocabulary

VOCABULARY = Vocabulary.of_size(2, 5)
PROGRAM = Program(
    writes=(("K00", "V000"), ("K01", "V001"), ("K00", "V002"), ("K01", "V003")),
    reads=(Read(3, "K00", 2), Read(3, "K01", 3)),
)
HELDOUT = frozenset({("K00", "V002")})


def record(program=PROGRAM):
    return build_record(program, VOCABULARY, sample_id="x_0", split="x", heldout_pairs=HELDOUT)


def test_record_by_hand():
    """A record has the tokens and events that were written out by hand."""
    r = record()
    assert r["tokens"] == [
        "<bos>",
        "W",
        "K00",
        "V000",
        "W",
        "K01",
        "V001",
        "W",
        "K00",
        "V002",
        "W",
        "K01",
        "V003",
        "R",
        "K00",
        "V002",
        "R",
        "K01",
        "V003",
        "<eos>",
    ]
    assert r["token_ids"][:4] == [1, 8, 10, 12]
    first = r["query_events"][0]
    assert first["positions"] == {"op": 13, "key": 14, "answer": 15}
    assert first["support_positions"] == {"op": 7, "key": 8, "value": 9}
    assert (first["writes_since_support"], first["tokens_since_support"]) == (1, 6)
    assert first["answer_pair_type"] == "heldout" and r["query_events"][1]["answer_pair_type"] == "seen"
    assert r["axes"] == {
        "active_keys": 2,
        "overwrite_count": 2,
        "num_queries": 2,
        "total_writes": 4,
        "mean_query_lag": 0,  # lags 1 and 0, floored
        "max_query_lag": 1,
        "context_tokens": 20,
    }
    assert program_of(r) == PROGRAM


def test_replay():
    """Replay finds each read's support, its stale value and earlier answers."""
    program = Program(PROGRAM.writes, (Read(2, "K00", 2), Read(3, "K00", 2)))
    earlier, later = replay(record(program)["tokens"])
    assert later.support_value_position == earlier.support_value_position == 9
    assert later.stale_value_position == 3
    assert later.earlier_answer_positions == (earlier.answer_position,)
    assert earlier.earlier_answer_positions == ()


@pytest.mark.parametrize(
    ("tokens", "complaint"),
    [
        ("<bos> W K00 V000 R K00 V001 <eos>", "to return V000; found V001"),
        ("<bos> R K00 V000 <eos>", "expected a write of K00"),
        ("<bos> W K00 <eos>", "events of three tokens"),
        ("<bos> X K00 V000 <eos>", "expected W or R"),
    ],
)
def test_invalid_streams(tokens, complaint):
    """Replay refuses tokens that are no stream."""
    with pytest.raises(InputError, match=complaint):
        replay(tokens.split())


def test_heuristics_by_hand():
    """The heuristics score as counted by hand."""
    # The first read returns the last value of its key but not the last value written; the second returns the last.
    accuracies = heuristic_accuracies([record()])
    assert accuracies == {
        "first_value_for_key": 0.0,
        "last_value_before_query": 0.0,  # V003 and V002 stand before the two reads
        "most_frequent_value_before_query": 0.0,  # all were written once: V000, first by name
    }
