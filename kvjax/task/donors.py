"""Draws donors for resample ablation: for each token, a random token of its role in another sequence of its split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvjax.errors import InputError
from kvjax.task.encoding import Bucket, EncodedRecords
from kvjax.task.vocabulary import PAD_ID


def draw_donors(encoded: EncodedRecords, *, draws: int, seed: int) -> np.ndarray:
    """Draws, for every token, the tokens that its activations are resampled from: int [draws, N, T].

    Token t of sequence n has the number n * T + t. Roles are those of `TOKEN_ROLES`, and the first token has its own.
    Padding is its own donor. The draw depends on the records and the seed, not on the batches.

    Raises:
      InputError: a split has only one record, so that no other sequence can be drawn from.
    """
    rng = np.random.default_rng(seed)
    num_records, length = encoded.tokens.shape
    donors = np.tile(np.arange(num_records * length).reshape(1, num_records, length), (draws, 1, 1))
    for split in np.unique(encoded.splits):
        members = np.flatnonzero(encoded.splits == split)
        for role in np.unique(encoded.token_roles[members][encoded.tokens[members] != PAD_ID]):
            here = (encoded.token_roles[members] == role) & (encoded.tokens[members] != PAD_ID)
            rows, positions = np.nonzero(here)
            rows = members[rows]
            if len(np.unique(rows)) < 2:
                raise InputError("resample ablation: expected two or more records in every split; found one")
            for draw in range(draws):
                chosen = rng.integers(len(rows), size=len(rows))
                while (own := rows[chosen] == rows).any():
                    chosen[own] = rng.integers(len(rows), size=int(own.sum()))
                donors[draw, rows, positions] = rows[chosen] * length + positions[chosen]
    return donors


def donors_by_bucket(donors: np.ndarray, buckets: Sequence[Bucket]) -> tuple[np.ndarray, ...]:
    """Arranges the donors by bucket and microbatch, int32 [microbatch, draws, B, T] each.

    A donor's number there is its row in the concatenation of all buckets' tokens, [sum of microbatch * B * T].
    """
    draws, num_records, length = donors.shape
    place = np.zeros((num_records, length), np.int64)
    offset = 0
    for bucket in buckets:
        width = bucket.batches.tokens.shape[-1]
        real = np.flatnonzero(bucket.indices >= 0)
        place[bucket.indices[real], :width] = offset + real[:, None] * width + np.arange(width)[None]
        offset += len(bucket.indices) * width
    found = []
    for bucket in buckets:
        microbatches, size, width = bucket.batches.tokens.shape
        rows = np.where(bucket.indices < 0, bucket.indices.max(), bucket.indices)  # padding rows repeat a record
        flat = place.reshape(-1)[donors[:, rows, :width]].astype(np.int32)
        found.append(flat.reshape(draws, microbatches, size, width).swapaxes(0, 1))
    return tuple(found)
