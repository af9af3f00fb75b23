"""Encodes pairs of clean and corrupted streams as arrays of positions and reads."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from kvjax.errors import InputError
from kvjax.task.corruption import PAIR_KINDS, PAIR_ROLES
from kvjax.task.encoding import NO_ROLE, EncodedRecords, encode_records, length_edges, microbatches
from kvjax.task.pairs import StreamPair
from kvjax.task.stream import replay
from kvjax.task.vocabulary import PAD_ID, Vocabulary

# The arrays of `EncodedPairs` that have an axis of reads.
_OF_READS = (
    "is_read",
    "is_affected",
    "is_target",
    "prediction_positions",
    "support_positions",
    "clean_answers",
    "corrupted_answers",
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncodedPairs:
    """N pairs as arrays, right-padded to T tokens and Q reads.

    The metric is logit(clean answer) − logit(corrupted answer) at the prediction position of every affected read.

    Attributes:
      clean_tokens, corrupted_tokens: [N, T] int32 ids, `PAD_ID` beyond the end.
      kinds: [N] int8 index into `PAIR_KINDS`.
      weights: [N] float32: 1 for a pair, 0 for padding rows.
      is_read: [N, Q] bool: whether the pair has that many reads.
      is_affected: [N, Q] bool: whether the read's answer differs between the streams.
      is_target: [N, Q] bool: the one read that the corruption is for.
      prediction_positions: [N, Q] int32 p_e, 0 for no read.
      support_positions: [N, Q] int32 s_e in the clean stream, 0 for no read.
      clean_answers, corrupted_answers: [N, Q] int32 token ids, 0 for no read; equal if the read is not affected.
      roles: [N, T] int8 index into `PAIR_ROLES`; `NO_ROLE` after the last affected prediction position.
      is_changed: [N, T] bool: whether the tokens differ there, up to the last affected prediction position.
      first_changed: [N] int32 the first position whose tokens differ.
      last_affected: [N] int32 p_e of the last affected read; later positions cannot affect the metric.
    """

    clean_tokens: np.ndarray
    corrupted_tokens: np.ndarray
    kinds: np.ndarray
    weights: np.ndarray
    is_read: np.ndarray
    is_affected: np.ndarray
    is_target: np.ndarray
    prediction_positions: np.ndarray
    support_positions: np.ndarray
    clean_answers: np.ndarray
    corrupted_answers: np.ndarray
    roles: np.ndarray
    is_changed: np.ndarray
    first_changed: np.ndarray
    last_affected: np.ndarray

    def __len__(self) -> int:
        return len(self.clean_tokens)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each pair's streams, [N]."""
        return (self.clean_tokens != PAD_ID).sum(axis=1)

    def until_last_affected(self) -> EncodedPairs:
        """Drops the tokens and reads after each pair's last affected read: they cannot affect the metric."""
        later_token = np.arange(self.clean_tokens.shape[1])[None] > self.last_affected[:, None]
        later_read = self.prediction_positions > self.last_affected[:, None]
        tokens = {
            name: np.where(later_token, PAD_ID, getattr(self, name)) for name in ("clean_tokens", "corrupted_tokens")
        }
        reads = {
            name: np.where(later_read, 0, getattr(self, name)) for name in ("prediction_positions", "support_positions")
        }
        return dataclasses.replace(self, **tokens, **reads, is_read=self.is_read & ~later_read)

    def at_affected_reads(self) -> EncodedPairs:
        """Drops the reads whose answer is the same in both streams, which the metric does not count."""
        order = np.argsort(~self.is_affected, axis=1, kind="stable")
        kept = np.take_along_axis(self.is_affected, order, axis=1)
        reads = {name: np.take_along_axis(getattr(self, name), order, axis=1) for name in _OF_READS}
        return dataclasses.replace(self, **{name: np.where(kept, x, np.zeros_like(x)) for name, x in reads.items()})

    def take(self, indices: np.ndarray) -> EncodedPairs:
        """Selects the pairs at `indices`, cut to the longest of them."""
        taken = {f.name: getattr(self, f.name)[indices] for f in dataclasses.fields(self)}
        length = int((taken["clean_tokens"] != PAD_ID).sum(axis=1).max())
        reads = int(taken["is_read"].sum(axis=1).max())
        for name in ("clean_tokens", "corrupted_tokens", "roles", "is_changed"):
            taken[name] = taken[name][:, :length]
        for name in _OF_READS:
            taken[name] = taken[name][:, :reads]
        return EncodedPairs(**taken)


def encode_pairs(pairs: Sequence[StreamPair], vocabulary: Vocabulary, *, max_seq_len: int) -> EncodedPairs:
    """Encodes pairs as arrays.

    Raises:
      InputError: `pairs` is empty, or one is longer than the model's positions.
    """
    if not pairs:
        raise InputError("pairs: expected at least one; found none")
    longest = max(pairs, key=lambda pair: len(pair.clean_tokens))
    length = len(longest.clean_tokens)
    if length > max_seq_len:
        raise InputError(f"{longest.pair_id}: expected at most max_seq_len {max_seq_len} tokens; found {length}")
    by_token = (len(pairs), length)
    by_read = (len(pairs), max(len(pair.reads) for pair in pairs))
    encoded = EncodedPairs(
        clean_tokens=np.full(by_token, PAD_ID, np.int32),
        corrupted_tokens=np.full(by_token, PAD_ID, np.int32),
        kinds=np.array([PAIR_KINDS.index(pair.kind) for pair in pairs], np.int8),
        weights=np.ones(len(pairs), np.float32),
        is_read=np.zeros(by_read, bool),
        is_affected=np.zeros(by_read, bool),
        is_target=np.zeros(by_read, bool),
        prediction_positions=np.zeros(by_read, np.int32),
        support_positions=np.zeros(by_read, np.int32),
        clean_answers=np.zeros(by_read, np.int32),
        corrupted_answers=np.zeros(by_read, np.int32),
        roles=np.full(by_token, NO_ROLE, np.int8),
        is_changed=np.zeros(by_token, bool),
        first_changed=np.zeros(len(pairs), np.int32),
        last_affected=np.zeros(len(pairs), np.int32),
    )
    for n, pair in enumerate(pairs):
        size = len(pair.clean_tokens)
        encoded.clean_tokens[n, :size] = pair.clean_token_ids
        encoded.corrupted_tokens[n, :size] = pair.corrupted_token_ids
        encoded.roles[n, :size] = [NO_ROLE if role is None else PAIR_ROLES.index(role) for role in pair.position_roles]
        changed = [*pair.changed_inputs, *pair.changed_answers]
        encoded.is_changed[n, changed] = True
        encoded.first_changed[n] = min(changed)
        encoded.is_target[n, pair.target_read] = True
        for q, found in enumerate(replay(pair.clean_tokens)):
            encoded.support_positions[n, q] = found.support_value_position
        for q, read in enumerate(pair.reads):
            encoded.is_read[n, q] = True
            encoded.is_affected[n, q] = read.answer_changes
            encoded.prediction_positions[n, q] = read.prediction_position
            encoded.clean_answers[n, q] = vocabulary.id_of[read.clean_answer]
            encoded.corrupted_answers[n, q] = vocabulary.id_of[read.corrupted_answer]
        encoded.last_affected[n] = max(read.prediction_position for read in pair.reads if read.answer_changes)
    return encoded


def encode_clean_streams(
    pairs: Sequence[StreamPair], vocabulary: Vocabulary, *, max_seq_len: int
) -> tuple[EncodedRecords, np.ndarray]:
    """Encodes the distinct clean streams of pairs as records, and finds each pair's record: int [N].

    Splits are numbered as they appear. Splits of a single stream are merged with one another, or with the first split,
    so that resample ablation always has another stream to draw from.
    """
    streams = {tuple(pair.clean_tokens): pair for pair in pairs}
    splits = Counter(pair.split for pair in streams.values())
    alone = [split for split, count in splits.items() if count == 1]
    joined = dict.fromkeys(alone, alone[0] if len(alone) > 1 else next(iter(splits)))
    names = [joined.get(pair.split, pair.split) for pair in streams.values()]
    records = [
        {"sample_id": pair.clean_id, "split": name, "tokens": pair.clean_tokens}
        for pair, name in zip(streams.values(), names, strict=True)
    ]
    encoded = encode_records(records, vocabulary, list(dict.fromkeys(names)), max_seq_len=max_seq_len)
    index = {tokens: n for n, tokens in enumerate(streams)}
    return encoded, np.array([index[tuple(pair.clean_tokens)] for pair in pairs])


@dataclasses.dataclass(frozen=True)
class PairBucket:
    """Pairs that are computed at about as many positions, in microbatches.

    Attributes:
      batches: the arrays of `EncodedPairs`, reshaped to [microbatch, B, …].
      indices: [microbatch * B] the row of the original arrays that each row holds; -1 for padding.
      window: the number of positions, from the first changed token on, that a change can reach.
      several: how many roles of one pair have more than one position, at most.
    """

    batches: EncodedPairs
    indices: np.ndarray
    window: int
    several: int


def bucket_by_window(encoded: EncodedPairs, **sizes: Any) -> list[PairBucket]:
    """Sorts pairs into buckets by the distance from the first changed token to the last affected read.

    Args:
      encoded: the pairs.
      **sizes: as for `bucket_by_last_affected`.
    """
    return _buckets(encoded, _windows(encoded), **sizes)


def bucket_by_last_affected(encoded: EncodedPairs, **sizes: Any) -> list[PairBucket]:
    """Sorts pairs into buckets by the position of the last affected read, for measurements of whole streams.

    Args:
      encoded: the pairs.
      **sizes: `tokens_per_batch`, about how many tokens a microbatch holds; `max_buckets`, how many different sizes to
        pad to; `devices`, of which each gets as many microbatches of a bucket; `most_pairs`, how many pairs of a window
        a microbatch may hold.
    """
    return _buckets(encoded, encoded.last_affected + 1, **sizes)


def _windows(encoded: EncodedPairs) -> np.ndarray:
    return encoded.last_affected - encoded.first_changed + 1


def _several(roles_NxT: np.ndarray) -> int:
    """Counts the roles inside the window that a pair has at more than one position, at most."""
    inside = [role for role in range(len(PAIR_ROLES)) if PAIR_ROLES[role] != "before"]
    counts = np.stack([(roles_NxT == role).sum(axis=1) for role in inside])
    return int((counts > 1).sum(axis=0).max())


def _buckets(
    encoded: EncodedPairs,
    spans: np.ndarray,
    *,
    tokens_per_batch: int,
    max_buckets: int = 3,
    devices: int = 1,
    most_pairs: Callable[[int], int] | None = None,
) -> list[PairBucket]:
    """Sorts pairs, cut after their last affected read and with these reads alone, into buckets of similar spans."""
    needed, windows = encoded.until_last_affected().at_affected_reads(), _windows(encoded)
    buckets, shorter = [], 0
    for edge in length_edges(spans, max_buckets):
        members = np.flatnonzero((spans > shorter) & (spans <= edge))
        length = int(needed.lengths[members].max())
        window, size = int(windows[members].max()), max(1, tokens_per_batch // length)
        size = size if most_pairs is None else max(1, min(size, most_pairs(window)))
        batches, indices = microbatches(needed, members, size, devices=devices)
        buckets.append(PairBucket(batches, indices, window, _several(needed.roles[members])))
        shorter = edge
    return buckets
