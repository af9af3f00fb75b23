"""Eager PyTorch: one batched forward per ablation and one clean pass, answers reduced to per-sequence sums."""

from __future__ import annotations

import numpy as np
import torch

from converters.torch_decoder import TorchDecoder
from kvjax.task.encoding import EncodedRecords


class TorchAblations:
    """The clean pass and every head and MLP ablation of a checkpoint, over all records.

    Args:
      module: the checkpoint.
      encoded: the records.
      value_ids: token ids of the values, for margins.
      batch_size: sequences per forward pass.
    """

    def __init__(self, module: TorchDecoder, encoded: EncodedRecords, value_ids: np.ndarray, batch_size: int):
        self._module = module
        self._batch_size = batch_size
        self._tokens = torch.from_numpy(encoded.tokens.astype(np.int64))
        self._positions = torch.from_numpy(encoded.prediction_positions.astype(np.int64))
        self._answers = torch.from_numpy(encoded.answers.astype(np.int64))
        self._is_read = torch.from_numpy(encoded.is_read)
        self._value_ids = torch.from_numpy(value_ids.astype(np.int64))

    @torch.inference_mode()
    def measure(self) -> dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]]:
        """Returns () | (layer, head) | (layer,) -> right answers and margin sums per sequence, [N] each."""
        results = {(): self._answers_of_all()}
        for layer, block in enumerate(self._module.blocks):
            for head in range(len(block.attn.head_scale)):
                block.attn.head_scale[head] = 0.0
                results[layer, head] = self._answers_of_all()
                block.attn.head_scale[head] = 1.0
            block.mlp_scale = 0.0
            results[layer,] = self._answers_of_all()
            block.mlp_scale = 1.0
        return results

    def _answers_of_all(self) -> tuple[np.ndarray, np.ndarray]:
        batches = [
            self._answers_of(slice(i, i + self._batch_size)) for i in range(0, len(self._tokens), self._batch_size)
        ]
        correct, margin = zip(*batches, strict=True)
        return torch.cat(correct).numpy(), torch.cat(margin).numpy()

    def _answers_of(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self._tokens[rows]
        tokens = tokens[:, : int((tokens != 0).sum(1).max())]
        logits = self._module(tokens)
        positions = self._positions[rows]
        at_reads = logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))
        answers, is_read = self._answers[rows], self._is_read[rows]
        values = at_reads[..., self._value_ids]
        is_answer = self._value_ids == answers[..., None]
        margin = (values * is_answer).sum(-1) - values.masked_fill(is_answer, float("-inf")).amax(-1)
        correct = at_reads.argmax(-1) == answers
        return (correct & is_read).sum(1), (margin * is_read).sum(1)
