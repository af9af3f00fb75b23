"""Defines a checkpoint with its parameters, and the interface that loads a run's checkpoints.

This module does not import torch: stored parameters are read without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Agreement of the Flax model with the PyTorch model on sample sequences.

    Attributes:
      num_sequences: how many sequences were compared, at every non-pad position.
      max_abs_logit: the largest |logit| of the PyTorch model.
      max_abs_difference: the largest |logit difference|.
      argmax_near_ties: positions whose argmax differs because PyTorch's two largest logits nearly tie.
    """

    num_sequences: int
    max_abs_logit: float
    max_abs_difference: float
    argmax_near_ties: int

    @property
    def relative_difference(self) -> float:
        """The largest difference as a share of the largest |logit|; 0 if all logits are 0."""
        return self.max_abs_difference / self.max_abs_logit if self.max_abs_logit else 0.0


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The parameters of a run at one training step.

    Attributes:
      step: the training step.
      params: the Flax parameters, with layers stacked on a leading axis.
      config: their shape.
      path: the `.pt` file they come from.
      sha256: the hash of that file's bytes.
      certificate: parity with PyTorch; None if the conversion was not certified.
      recorded_config: the `config` that the trainer recorded in the file, as JSON.
      recorded_metrics: the `metrics` that the trainer recorded in the file, as JSON.
      notes: warnings for a reader, such as that the checkpoint was trained on another benchmark.
    """

    step: int
    params: Params
    config: DecoderConfig
    path: Path
    sha256: str
    certificate: Certificate | None
    recorded_config: Mapping[str, Any]
    recorded_metrics: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """The size of the parameters."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))


class CheckpointSource(Protocol):
    """Loads a run's checkpoints, converted and certified."""

    def load(self, path: Path, expected_step: int | None) -> Checkpoint:
        """Loads the checkpoint of a file; may be called from several threads."""

    def shapes(self, path: Path) -> Params:
        """Reads the shapes of the parameters in a file, in a fraction of the time that loading it takes."""

    def is_stored(self, sha256: str) -> bool:
        """Checks whether the parameter store has the checkpoint of the file with this hash."""

    def save(self) -> None:
        """Writes new conversions to the parameter store, so that later runs only read them."""
