"""Runs eager PyTorch: one batched forward pass per ablation and a clean one, answers as per-sequence sums."""

from __future__ import annotations

import numpy as np
import torch
from kvjax.converters.torch_decoder import TorchDecoder

from benchmarks.peers.answers import AnswerSums
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
        self._answers = AnswerSums(encoded, value_ids, batch_size, device=module.lm_head.weight.device)

    @torch.inference_mode()
    def measure(self) -> dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]]:
        """Sums right answers and margins per sequence, [N] each, keyed by (), (layer, head) or (layer,)."""
        results = {(): self._answers.of(self._module)}
        for layer, block in enumerate(self._module.blocks):
            for head in range(len(block.attn.head_scale)):
                block.attn.head_scale[head] = 0.0
                results[layer, head] = self._answers.of(self._module)
                block.attn.head_scale[head] = 1.0
            block.mlp_scale = 0.0
            results[layer,] = self._answers.of(self._module)
            block.mlp_scale = 1.0
        return results
