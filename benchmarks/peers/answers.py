"""Reduces a peer's logits to right answers and margins, summed over the reads of each sequence."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from kvjax.task.encoding import EncodedRecords


class AnswerSums:
    """Records as tensors, and the answers a model gives to their reads.

    Args:
      encoded: the records.
      value_ids: token ids of the values, for margins.
      batch_size: sequences per forward pass.
      device: where the model is.
    """

    def __init__(self, encoded: EncodedRecords, value_ids: np.ndarray, batch_size: int, *, device: torch.device):
        self._batch_size = batch_size
        self._tokens = torch.from_numpy(encoded.tokens.astype(np.int64)).to(device)
        self._positions = torch.from_numpy(encoded.prediction_positions.astype(np.int64)).to(device)
        self._answers = torch.from_numpy(encoded.answers.astype(np.int64)).to(device)
        self._is_read = torch.from_numpy(encoded.is_read).to(device)
        self._value_ids = torch.from_numpy(value_ids.astype(np.int64)).to(device)

    def of(self, forward: Callable[[torch.Tensor], torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Sums right answers and margins per sequence, [N] each, of a model of tokens [B, T]."""
        batches = [
            self._of_batch(forward, slice(i, i + self._batch_size))
            for i in range(0, len(self._tokens), self._batch_size)
        ]
        correct, margin = zip(*batches, strict=True)
        return torch.cat(correct).cpu().numpy(), torch.cat(margin).cpu().numpy()

    def _of_batch(
        self, forward: Callable[[torch.Tensor], torch.Tensor], rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self._tokens[rows]
        tokens = tokens[:, : int((tokens != 0).sum(1).max())]
        logits = forward(tokens)
        positions = self._positions[rows]
        at_reads = logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))
        answers, is_read = self._answers[rows], self._is_read[rows]
        values = at_reads[..., self._value_ids]
        is_answer = self._value_ids == answers[..., None]
        margin = (values * is_answer).sum(-1) - values.masked_fill(is_answer, float("-inf")).amax(-1)
        correct = at_reads.argmax(-1) == answers
        return (correct & is_read).sum(1), (margin * is_read).sum(1)
