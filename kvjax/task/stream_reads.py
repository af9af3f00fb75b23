"""The distinct clean streams of pairs, each with the affected reads of all its pairs: it is run once for them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from kvjax.task.encoding import EncodedRecords, length_edges, microbatches
from kvjax.task.pair_encoding import EncodedPairs
from kvjax.task.vocabulary import PAD_ID

READS_PER_ROW = 4  # a stream with more is run again: most have one or two, and every row is padded to the longest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamReads:
    """N rows of clean streams as arrays, padded to T tokens and Q affected reads.

    Attributes:
      tokens: [N, T] int32 ids up to the last read, then `PAD_ID`.
      streams: [N] int32 index of the stream.
      weights: [N] float32: 1 for a row, 0 for padding rows.
      prediction_positions: [N, Q] int32 p_e, 0 for no read.
      clean_answers, corrupted_answers: [N, Q] int32 token ids, 0 for no read.
      is_affected: [N, Q] bool: whether the row has that many reads.
      pairs: [N, Q] int32 index of the read's pair.
    """

    tokens: np.ndarray
    streams: np.ndarray
    weights: np.ndarray
    prediction_positions: np.ndarray
    clean_answers: np.ndarray
    corrupted_answers: np.ndarray
    is_affected: np.ndarray
    pairs: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(cls, encoded: EncodedPairs, clean: EncodedRecords, clean_rows: np.ndarray) -> StreamReads:
        """Collects the affected reads of pairs by their clean streams.

        Args:
          encoded: the pairs.
          clean, clean_rows: the distinct clean streams, and which of them each pair has.
        """
        rows: list[list[tuple[int, int]]] = []
        for stream in range(len(clean)):
            own = [(n, q) for n in np.flatnonzero(clean_rows == stream) for q in np.flatnonzero(encoded.is_affected[n])]
            rows += [own[first : first + READS_PER_ROW] for first in range(0, len(own), READS_PER_ROW)]
        by_read = (len(rows), max(map(len, rows)))
        is_affected = np.arange(by_read[1])[None] < np.array([[len(row)] for row in rows])
        pairs, reads = np.zeros((2, *by_read), np.int32)
        pairs[is_affected], reads[is_affected] = np.array([read for row in rows for read in row]).T

        def of_read(x_NxQ: np.ndarray) -> np.ndarray:
            return np.where(is_affected, x_NxQ[pairs, reads], 0)

        streams = clean_rows[pairs[:, 0]].astype(np.int32)
        positions, tokens = of_read(encoded.prediction_positions), clean.tokens[streams]
        later = np.arange(tokens.shape[1])[None] > positions.max(axis=1, keepdims=True)
        return cls(
            np.where(later, PAD_ID, tokens),
            streams,
            np.ones(len(rows), np.float32),
            positions,
            of_read(encoded.clean_answers),
            of_read(encoded.corrupted_answers),
            is_affected,
            pairs,
        )

    def take(self, indices: np.ndarray) -> StreamReads:
        """Selects the rows at `indices`, cut to the longest of them."""
        taken = {field.name: getattr(self, field.name)[indices] for field in dataclasses.fields(self)}
        taken["tokens"] = taken["tokens"][:, : int(taken["prediction_positions"].max()) + 1]
        return StreamReads(**taken)


@dataclasses.dataclass(frozen=True)
class StreamBucket:
    """Streams of about one length, in microbatches.

    Attributes:
      batches: the arrays of `StreamReads`, reshaped to [microbatch, B, …].
      indices: [microbatch * B] the row that each holds; -1 for padding.
    """

    batches: StreamReads
    indices: np.ndarray


def bucket_streams(rows: StreamReads, *, tokens_per_batch: int, max_buckets: int, devices: int) -> list[StreamBucket]:
    """Sorts rows into buckets by the position of the last read; arguments as for buckets of pairs."""
    lengths, buckets, shorter = rows.prediction_positions.max(axis=1) + 1, [], 0
    for edge in length_edges(lengths, max_buckets):
        members = np.flatnonzero((lengths > shorter) & (lengths <= edge))
        size = max(1, tokens_per_batch // edge)
        buckets.append(StreamBucket(*microbatches(rows, members, size, devices=devices)))
        shorter = edge
    return buckets
