"""What a conversion hands on. Nothing here imports torch, so that what was converted before is read without it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvjax.model.decoder import Params


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Agreement of the two implementations on sample sequences.

    Attributes:
      num_sequences: how many sequences were compared, at every non-pad position.
      max_abs_logit: the largest |logit| of the PyTorch side.
      max_abs_difference: the largest |logit difference|; at most a tolerance's share of `max_abs_logit`.
      argmax_near_ties: positions whose argmax differs because PyTorch's two largest logits are closer than twice
        the tolerance. Any other difference of argmax refuses the conversion.
    """

    num_sequences: int
    max_abs_logit: float
    max_abs_difference: float
    argmax_near_ties: int

    @property
    def relative_difference(self) -> float:
        """The largest difference as a share of the largest |logit|; 0 where all logits are 0."""
        return self.max_abs_difference / self.max_abs_logit if self.max_abs_logit else 0.0


@dataclasses.dataclass(frozen=True)
class ConvertedCheckpoint:
    """A checkpoint as Flax parameters.

    Attributes:
      path: its `.pt` file, with `sha256` of that file's bytes.
      step: the training step.
      params: the Flax tree.
      certificate: parity with PyTorch, where one was asked for.
      recorded: what the file holds beside tensors: `config` and `metrics`, as JSON has them.
      notes: what a reader should know of it, such as that it was trained on another benchmark.
    """

    path: Path
    sha256: str
    step: int
    params: Params
    certificate: Certificate | None
    recorded: Mapping[str, Any]
    notes: tuple[str, ...]
