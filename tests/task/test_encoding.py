"""Encoding: positions, roles and relations by hand; buckets lose and repeat nothing."""

import binascii

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.errors import InputError
from kvjax.task.encoding import (
    RELATION_CURRENT,
    RELATION_NULL_KEY,
    RELATION_OLDER,
    RELATION_OTHER,
    RELATION_OTHER_KEY,
    RELATION_STALE,
    TOKEN_ROLES,
    bucket_by_length,
    copy_axes,
    encode_records,
    length_edges,
    microbatches,
)
from kvjax.task.stream import Program, Read, build_record
from kvjax.task.vocabulary import Vocabulary

VOCABULARY = Vocabulary.of_size(3, 30)


def record(program, n=0):
    return build_record(program, VOCABULARY, sample_id=f"a_{n}", split="a", heldout_pairs=frozenset())


def test_relations_by_hand():
    """Relations of each read to each write, of a stream written out by hand."""
    # position:  1 W K00 3 | 4 W K01 6 | 7 W K00 9 | 10 R K00 12 | 13 W K00 15 | 16 R K00 18 | 19 R K00 21
    program = Program(
        (("K00", "V000"), ("K01", "V001"), ("K00", "V002"), ("K00", "V003")),
        (Read(2, "K00", 2), Read(3, "K00", 3), Read(3, "K00", 3)),
    )
    encoded = encode_records([record(program)], VOCABULARY, ["a"], max_seq_len=64)
    relation = encoded.relations[0, 2]
    assert {position: int(relation[position]) for position in (3, 6, 9, 12, 15, 18)} == {
        3: RELATION_OLDER,
        6: RELATION_NULL_KEY,  # of the only other key
        9: RELATION_STALE,
        12: RELATION_STALE,  # an answer that copied the stale value
        15: RELATION_CURRENT,
        18: RELATION_CURRENT,  # an earlier answer that copied the current value
    }
    assert relation[21] == RELATION_OTHER, "the answer itself lies after the prediction"
    assert encoded.prediction_positions[0].tolist() == [11, 17, 20]
    assert encoded.support_positions[0].tolist() == [9, 15, 15]
    assert encoded.answers[0].tolist() == [VOCABULARY.id_of[v] for v in ("V002", "V003", "V003")]
    roles = [TOKEN_ROLES[role] if role >= 0 else None for role in encoded.token_roles[0]]
    assert roles[0] is None and roles[-1] == "eos" and roles[10:13] == ["op_read", "key_read", "value_answer"]


def test_null_key_by_hand():
    """One of the other keys written before is the null's, by the checksum of the tokens up to the read's key."""
    program = Program(
        (("K00", "V000"), ("K01", "V001"), ("K02", "V002"), ("K01", "V003")),
        (Read(0, "K00", 0), Read(3, "K00", 0)),
    )
    encoded = encode_records([record(program)], VOCABULARY, ["a"], max_seq_len=64)
    first, second = encoded.relations[0]
    assert RELATION_NULL_KEY not in first, "no other key is written yet"
    # position: 1 W K00 3 | 4 R K00 6 | 7 W K01 9 | 10 W K02 12 | 13 W K01 15 | 16 R K00 18
    tokens = "<bos> W K00 V000 R K00 V000 W K01 V001 W K02 V002 W K01 V003 R K00"
    null = ("K01", "K02")[binascii.crc32(tokens.encode()) % 2]
    expected = {"K01": [9, 15], "K02": [12]}
    assert np.flatnonzero(second == RELATION_NULL_KEY).tolist() == expected[null]
    assert np.flatnonzero(second == RELATION_OTHER_KEY).tolist() == expected["K02" if null == "K01" else "K01"]


def programs(num_writes):
    writes = tuple((f"K{i % 2:02d}", f"V{i:03d}") for i in range(num_writes))
    return Program(writes, (Read(num_writes - 1, f"K{(num_writes - 1) % 2:02d}", num_writes - 1),))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 20), min_size=1, max_size=40), st.integers(8, 400), st.integers(1, 4))
def test_buckets(sizes, tokens_per_batch, max_buckets):
    """Buckets hold every record once and mark the rows that fill them up."""
    records = [record(programs(size), n) for n, size in enumerate(sizes)]
    encoded = encode_records(records, VOCABULARY, ["a"], max_seq_len=96)
    buckets = bucket_by_length(encoded, tokens_per_batch=tokens_per_batch, max_buckets=max_buckets)
    assert len(buckets) <= max_buckets
    real = np.concatenate([bucket.indices[bucket.indices >= 0] for bucket in buckets])
    assert sorted(real.tolist()) == list(range(len(records)))
    for bucket in buckets:
        flat = bucket.batches.tokens.reshape(-1, bucket.batches.tokens.shape[-1])
        for row, index, weight in zip(flat, bucket.indices, bucket.batches.weights.ravel(), strict=True):
            assert weight == (index >= 0)
            if index >= 0:
                length = len(records[index]["tokens"])
                assert row[:length].tolist() == records[index]["token_ids"] and not row[length:].any()


def test_padding_of_several_buckets():
    """Three buckets pad less than one."""
    sizes = [2] * 20 + [10] * 20 + [20] * 2
    encoded = encode_records([record(programs(s), n) for n, s in enumerate(sizes)], VOCABULARY, ["a"], max_seq_len=96)

    def padded(buckets):
        return sum(bucket.batches.tokens.size for bucket in buckets)

    three = bucket_by_length(encoded, tokens_per_batch=100_000)
    assert padded(three) == sum(encoded.lengths)
    assert padded(bucket_by_length(encoded, tokens_per_batch=100_000, max_buckets=1)) > padded(three)


@pytest.mark.parametrize(
    ("lengths", "spared", "edges"),
    [
        ([5] * 10 + [9] * 10 + [10], 1.0, (5, 9, 10)),  # 150 tokens
        ([5] * 10 + [9] * 10 + [10], 1.05, (5, 9, 10)),  # without 9 they are 160
        ([5] * 10 + [9] * 10 + [10], 1.07, (5, 10)),
        ([5] * 10 + [9] * 10 + [10], 1.5, (10,)),  # 210
        ([7] * 3, 1.05, (7,)),
    ],
)
def test_spared_lengths(lengths, spared, edges):
    """A length is spared if the others need nearly as few tokens."""
    assert length_edges(np.array(lengths), 3, spared=spared) == edges


@pytest.mark.parametrize(
    ("members", "batch_size", "devices", "shape"),
    [
        (219, 16, 1, (13, 17)),  # 221 rows, where 14 batches of 16 are 224
        (96, 10, 1, (8, 12)),  # none to fill
        (69, 16, 1, (5, 14)),  # 70 rows; 3 batches of 23 would be far from 16
        (6, 1, 1, (6, 1)),
        (7, 100, 1, (1, 7)),
        (100, 100, 1, (1, 100)),
        (219, 16, 2, (14, 16)),  # as many for each device
        (7, 100, 2, (2, 4)),
        (1, 100, 4, (4, 1)),
    ],
)
def test_microbatches(members, batch_size, devices, shape):
    """Microbatches share a bucket's records so that few rows are padding, as many for each device."""
    encoded = encode_records([record(programs(2), n) for n in range(members)], VOCABULARY, ["a"], max_seq_len=16)
    batches, indices = microbatches(encoded, np.arange(members), batch_size, devices=devices)
    assert batches.tokens.shape[:2] == shape
    assert np.count_nonzero(indices >= 0) == members


def test_too_long_record():
    """A record longer than the model's context is refused by name."""
    with pytest.raises(InputError, match=r"a\.jsonl: expected at most max_seq_len 16 tokens; found \d+ in a_0"):
        encode_records([record(programs(10))], VOCABULARY, ["a"], max_seq_len=16, source="a.jsonl")


def test_axes_of_copies_by_hand():
    """Earlier answers count for their own write alone; the nearest copy is the last of them, or the support."""
    # position: 1 W K00 3 | 4 R K00 6 | 7 R K00 9 | 10 W K01 12 | 13 R K00 15 | 16 R K01 18 | 19 W K00 21 | 22 R K00 24
    program = Program(
        (("K00", "V000"), ("K01", "V000"), ("K00", "V002")),  # the value at 12 is the one at 3, of another write
        (Read(0, "K00", 0), Read(0, "K00", 0), Read(1, "K00", 0), Read(1, "K01", 1), Read(2, "K00", 2)),
    )
    axes = copy_axes(encode_records([record(program)], VOCABULARY, ["a"], max_seq_len=64))
    assert axes["earlier_answers"].tolist() == [[0, 1, 2, 0, 0]]
    assert axes["tokens_since_copy"].tolist() == [[3, 3, 6, 6, 3]]
