"""Encodes records as arrays of tokens and reads, padded and bucketed by length."""

from __future__ import annotations

import dataclasses
import itertools
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self, TypeVar

import jax
import numpy as np

from kvjax.errors import InputError
from kvjax.task.stream import Record, replay
from kvjax.task.vocabulary import EOS, PAD_ID, READ, WRITE, Vocabulary

# So many times the fewest tokens are taken if that saves a length, for compiling one takes as long as measuring four
# checkpoints (docs/performance.md).
_SPARED_LENGTH = 1.05

# Roles of a token as a prediction target; `<bos>` and padding are never targets.
TOKEN_ROLES = ("op_write", "key_write", "value_write", "op_read", "key_read", "value_answer", "eos")
NO_ROLE = -1

# The relation of a position to a read after it. The groups are disjoint.
RELATION_OTHER = 0  # no value or answer token, or not before the prediction position
RELATION_CURRENT = 1  # the support value, and earlier answers that copied it
RELATION_STALE = 2  # the value the support overwrote, and answers that copied that
RELATION_OLDER = 3  # still older values of the key and their answers
RELATION_OTHER_KEY = 4  # values and answers of other keys
RELATION_NULL_KEY = 5  # those of one of the other keys, drawn for the read: the null of key selectivity

# What attention is summed over: the support value and its copies; the overwritten value and its copies; all values and
# answers of the key read; those of the null's key; all values and answers before the read.
RELATION_GROUPS = {
    "current": (RELATION_CURRENT,),
    "stale": (RELATION_STALE,),
    "key": (RELATION_CURRENT, RELATION_STALE, RELATION_OLDER),
    "null_key": (RELATION_NULL_KEY,),
    "value": (RELATION_CURRENT, RELATION_STALE, RELATION_OLDER, RELATION_OTHER_KEY, RELATION_NULL_KEY),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncodedRecords:
    """N records as arrays, right-padded to T tokens and Q reads.

    Attributes:
      tokens: [N, T] int32 ids, `PAD_ID` beyond the end.
      token_roles: [N, T] int8 index into `TOKEN_ROLES`, `NO_ROLE` if the token is no target.
      splits: [N] int32 index into the split names the records were encoded with.
      weights: [N] float32: 1 for a record, 0 for padding rows.
      is_read: [N, Q] bool: whether the record has that many reads.
      prediction_positions: [N, Q] int32 p_e; the read's key token stands there too (k_e = p_e). 0 for no read.
      support_positions: [N, Q] int32 s_e, 0 for no read.
      answers: [N, Q] int32 token id of y_e.
      stale_values: [N, Q] int32 token id of the value the support overwrote, `PAD_ID` if there is none.
      keys: [N, Q] int32 token id of the key read.
      relations: [N, Q, T] int8, one of the `RELATION_…` of each position to each read.
    """

    tokens: np.ndarray
    token_roles: np.ndarray
    splits: np.ndarray
    weights: np.ndarray
    is_read: np.ndarray
    prediction_positions: np.ndarray
    support_positions: np.ndarray
    answers: np.ndarray
    stale_values: np.ndarray
    keys: np.ndarray
    relations: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each record, [N]."""
        return (self.tokens != PAD_ID).sum(axis=1)

    def take(self, indices: np.ndarray) -> EncodedRecords:
        """Selects the records at `indices`, cut to the longest of them."""
        taken = {f.name: getattr(self, f.name)[indices] for f in dataclasses.fields(self)}
        length = int((taken["tokens"] != PAD_ID).sum(axis=1).max())
        reads = int(taken["is_read"].sum(axis=1).max())
        for name in ("tokens", "token_roles"):
            taken[name] = taken[name][:, :length]
        for name in ("is_read", "prediction_positions", "support_positions", "answers", "stale_values", "keys"):
            taken[name] = taken[name][:, :reads]
        taken["relations"] = taken["relations"][:, :reads, :length]
        return EncodedRecords(**taken)


class _Packed(Protocol):
    """Records or pairs as arrays of one leading axis."""

    weights: np.ndarray

    def take(self, indices: np.ndarray) -> Self: ...


Packed = TypeVar("Packed", bound=_Packed)


def encode_records(
    records: Sequence[Record],
    vocabulary: Vocabulary,
    splits: Sequence[str],
    *,
    max_seq_len: int,
    source: str | Path = "records",
) -> EncodedRecords:
    """Encodes records as arrays; everything about reads comes from replaying the tokens.

    Args:
      records: the records.
      vocabulary: of their benchmark.
      splits: names of splits, which records are numbered by.
      max_seq_len: positions of the model.
      source: the file that holds them, for errors.

    Raises:
      InputError: a record is longer than the model's positions, or a token is not in the vocabulary.
    """
    longest = max(records, key=lambda record: len(record["tokens"]))
    length = len(longest["tokens"])
    if length > max_seq_len:
        found = f"{length} in {longest['sample_id']}"
        raise InputError(f"{source}: expected at most max_seq_len {max_seq_len} tokens; found {found}")
    replayed = [replay(record["tokens"]) for record in records]
    shape = (len(records), max(map(len, replayed)))
    encoded = EncodedRecords(
        tokens=np.full((len(records), length), PAD_ID, np.int32),
        token_roles=np.full((len(records), length), NO_ROLE, np.int8),
        splits=np.array([list(splits).index(record["split"]) for record in records], np.int32),
        weights=np.ones(len(records), np.float32),
        is_read=np.zeros(shape, bool),
        prediction_positions=np.zeros(shape, np.int32),
        support_positions=np.zeros(shape, np.int32),
        answers=np.zeros(shape, np.int32),
        stale_values=np.full(shape, PAD_ID, np.int32),
        keys=np.zeros(shape, np.int32),
        relations=np.zeros((*shape, length), np.int8),
    )
    role_of = {role: index for index, role in enumerate(TOKEN_ROLES)}
    for n, (record, reads) in enumerate(zip(records, replayed, strict=True)):
        tokens = record["tokens"]
        try:
            encoded.tokens[n, : len(tokens)] = [vocabulary.id_of[token] for token in tokens]
        except KeyError as error:
            raise InputError(f"{record['sample_id']}: expected tokens of the vocabulary; found {error}") from None
        value_positions: list[tuple[int, str]] = []  # of writes and reads, with their key
        for at in range(1, len(tokens) - 1, 3):
            names = {
                WRITE: ("op_write", "key_write", "value_write"),
                READ: ("op_read", "key_read", "value_answer"),
            }
            encoded.token_roles[n, at : at + 3] = [role_of[name] for name in names[tokens[at]]]
            value_positions.append((at + 2, tokens[at + 1]))
        assert tokens[-1] == EOS  # `replay` refuses anything else
        encoded.token_roles[n, len(tokens) - 1] = role_of["eos"]
        for q, read in enumerate(reads):
            encoded.is_read[n, q] = True
            encoded.prediction_positions[n, q] = read.answer_position - 1
            encoded.support_positions[n, q] = read.support_value_position
            encoded.answers[n, q] = vocabulary.id_of[read.answer]
            encoded.keys[n, q] = vocabulary.id_of[read.key]
            relation = encoded.relations[n, q]
            relation_of = {read.key: RELATION_OLDER}
            if (null_key := _null_key(tokens[: read.answer_position])) is not None:
                relation_of[null_key] = RELATION_NULL_KEY
            for position, key in value_positions:
                if position < read.answer_position:
                    relation[position] = relation_of.get(key, RELATION_OTHER_KEY)
            if read.stale_value_position is not None:
                encoded.stale_values[n, q] = encoded.tokens[n, read.stale_value_position]
                relation[[read.stale_value_position, *read.stale_answer_positions]] = RELATION_STALE
            relation[[read.support_value_position, *read.earlier_answer_positions]] = RELATION_CURRENT
    return encoded


def _null_key(tokens: Sequence[str]) -> str | None:
    """Draws one of the other keys written before a read, the last of `tokens` being its key; None if there is none.

    The draw is seeded by the tokens alone, so that the same stream has the same null wherever it stands.
    """
    others = sorted({tokens[at + 1] for at in range(1, len(tokens) - 2, 3)} - {tokens[-1]})
    return others[zlib.crc32(" ".join(tokens).encode()) % len(others)] if others else None


def copy_axes(encoded: EncodedRecords) -> dict[str, np.ndarray]:
    """Finds how often and how lately each read's answer stood in its stream, as that write's: axis -> int [N, Q].

    `earlier_answers` counts the answers of earlier reads of the same write. `tokens_since_copy` is the answer's
    position minus that of the last of them, or minus the support's if there is none. Places that hold no read have any
    values.
    """
    current_NxQxT = encoded.relations == RELATION_CURRENT
    nearest_NxQ = np.where(current_NxQxT, np.arange(current_NxQxT.shape[-1]), -1).max(axis=-1)
    return {
        "earlier_answers": current_NxQxT.sum(axis=-1) - 1,
        "tokens_since_copy": encoded.prediction_positions + 1 - nearest_NxQ,
    }


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Records of similar length, in microbatches.

    Attributes:
      batches: the arrays of `EncodedRecords`, reshaped to [microbatch, B, …]; padding rows repeat a record with
        weight 0.
      indices: [microbatch * B] the row of the original arrays that each row holds; -1 for padding.
      horizon: positions from this one on affect no read's prediction.
    """

    batches: EncodedRecords
    indices: np.ndarray

    @property
    def horizon(self) -> int:
        return int(self.batches.prediction_positions.max()) + 1


def bucket_by_length(encoded: EncodedRecords, *, tokens_per_batch: int, max_buckets: int = 3) -> list[Bucket]:
    """Sorts the records into at most `max_buckets` length buckets, each cut into equal microbatches.

    The lengths are the fewest that need nearly as few tokens as any.

    Args:
      encoded: the records.
      tokens_per_batch: about how many tokens a microbatch holds; few enough to stay in cache on a CPU.
      max_buckets: how many different lengths to pad to.
    """
    lengths = encoded.lengths
    edges = length_edges(lengths, max_buckets, spared=_SPARED_LENGTH)
    buckets = []
    for shorter, edge in itertools.pairwise((0, *edges)):
        members = np.flatnonzero((lengths > shorter) & (lengths <= edge))
        members = members[np.argsort(lengths[members], kind="stable")]
        buckets.append(Bucket(*microbatches(encoded, members, max(1, tokens_per_batch // edge))))
    return buckets


def microbatches(
    encoded: Packed, members: np.ndarray, batch_size: int, *, devices: int = 1
) -> tuple[Packed, np.ndarray]:
    """Cuts some of the records into equal microbatches of about `batch_size`, a multiple of `devices` many.

    Returns:
      The arrays, reshaped to [microbatch, B, …]; and [microbatch * B] indices of the records, -1 for padding rows. A
      padding row repeats a record with weight 0.
    """
    num_batches = _fewest_fillers(len(members), batch_size, devices)
    batch_size = math.ceil(len(members) / num_batches)
    indices = np.full(num_batches * batch_size, -1)
    indices[: len(members)] = members
    rows = encoded.take(np.where(indices < 0, members[-1], indices))
    rows = dataclasses.replace(rows, weights=(indices >= 0).astype(np.float32))
    return jax.tree.map(lambda a: a.reshape(-1, batch_size, *a.shape[1:]), rows), indices


def _fewest_fillers(members: int, batch_size: int, devices: int) -> int:
    """Finds the number of equal batches, of `batch_size` give or take a fifth, that needs the fewest padding rows."""
    fewest, most = math.ceil(members / math.floor(1.2 * batch_size)), math.ceil(members / (0.8 * batch_size))
    least = devices * math.ceil(fewest / devices)
    counts = range(least, max(least, most) + 1, devices)
    return min(counts, key=lambda count: (count * math.ceil(members / count), count))


def length_edges(lengths: np.ndarray, max_buckets: int, *, spared: float = 1.0) -> tuple[int, ...]:
    """Finds the lengths to pad to that minimise the tokens, ascending, at most `max_buckets` of them.

    Args:
      lengths: of all rows.
      max_buckets: how many lengths there may be.
      spared: fewer lengths are taken if they need at most so many times the tokens.
    """
    distinct, counts = np.unique(lengths, return_counts=True)

    def tokens(inner: tuple[int, ...]) -> int:
        edges = np.array([*inner, distinct[-1]])
        return int((edges[np.searchsorted(edges, distinct)] * counts).sum())

    numbers = range(min(max_buckets, len(distinct)))
    best = [min(itertools.combinations(distinct[:-1], number), key=tokens) for number in numbers]
    inner = next(inner for inner in best if tokens(inner) <= spared * tokens(best[-1]))
    return (*map(int, inner), int(distinct[-1]))
