"""Runs eager PyTorch: one batched forward pass per ablation and a clean one, answers as per-sequence sums."""

from __future__ import annotations

import numpy as np
import torch
from kvjax.converters.torch_decoder import TorchBlock, TorchDecoder
from torch.utils.hooks import RemovableHandle

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
            for head in range(block.attn.n_heads):
                with _zero_head(block, head):
                    results[layer, head] = self._answers.of(self._module)
            with _zero_mlp(block):
                results[layer,] = self._answers.of(self._module)
        return results


def _zero_head(block: TorchBlock, head: int) -> RemovableHandle:
    """Zeroes a head's z on its way into the output projection, until the handle is removed."""

    def without_head(_: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        z = args[0].unflatten(-1, (block.attn.n_heads, -1)).clone()
        z[..., head, :] = 0.0
        return (z.flatten(-2),)

    return block.attn.out_proj.register_forward_pre_hook(without_head)


def _zero_mlp(block: TorchBlock) -> RemovableHandle:
    """Zeroes the output of a block's MLP, until the handle is removed."""
    return block.ff.register_forward_hook(lambda mlp, args, output: torch.zeros_like(output))
