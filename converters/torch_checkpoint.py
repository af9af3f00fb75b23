"""Reads and writes `.pt` checkpoints, without ever executing their content."""

from __future__ import annotations

import dataclasses
import io
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvjax.artifacts.files import HashedFile, replace_file
from kvjax.errors import InputError, unusable

OPTIMIZER_NAMES = ("optimizer_state", "optimizer", "optimizer_state_dict")  # in a checkpoint's document


@dataclasses.dataclass(frozen=True)
class TorchCheckpoint:
    """The content of a `.pt` file.

    Attributes:
      step: the training step it was saved at.
      state: `model_state`, tensor name -> float32 array.
      config: `train_spec`, `benchmark_metadata`, … as the trainer recorded them; empty if it recorded none.
      metrics: the evaluation results stored with it, by split; often empty.
      optimizer_state: what `optimizer.state_dict()` gave, with `state` and `param_groups` as they are and every tensor
        as a NumPy array of its own precision (bfloat16 widened to float32); empty if the trainer saved none.
    """

    step: int
    state: Mapping[str, np.ndarray]
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    optimizer_state: Mapping[str, Any]


def read_checkpoint(path: Path) -> TorchCheckpoint:
    """Reads a checkpoint file; half precision is widened to float32.

    Raises:
      InputError: there is no such file, or it cannot be used (see `parse_checkpoint`).
    """
    return parse_checkpoint(HashedFile.read(path, "a PyTorch checkpoint"))


def parse_checkpoint(file: HashedFile) -> TorchCheckpoint:
    """Parses the bytes of a checkpoint file; half precision is widened to float32.

    Raises:
      InputError: the file is damaged, is no checkpoint, or would need arbitrary unpickling. Nothing in it is executed.
    """
    path, document = file.path, _load(file)
    if not isinstance(document, dict) or not isinstance(document.get("model_state"), dict):
        found = sorted(map(str, document))[:6] if isinstance(document, dict) else type(document).__name__
        raise unusable(path, "a checkpoint with step and model_state", found)
    step = document.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise unusable(path, "a step that is a whole number", step)
    return TorchCheckpoint(
        step=step,
        state={str(name): _as_float32(path, name, t) for name, t in document["model_state"].items()},
        config=section(document, "config", path),
        metrics=section(document, "metrics", path),
        optimizer_state=_optimizer_state(document, path),
    )


def _optimizer_state(document: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Finds the optimiser's state under the names that trainers give it."""
    for name in OPTIMIZER_NAMES:
        if document.get(name) is not None:
            return _with_arrays(section(document, name, path))
    return {}


def _with_arrays(value: Any) -> Any:
    """Replaces the tensors of nested mappings and sequences by NumPy arrays."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    if isinstance(value, dict):
        return {key: _with_arrays(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_arrays(part) for part in value)
    return value


def section(document: Mapping[str, Any], name: str, where: object) -> Mapping[str, Any]:
    """Reads the mapping under a name of a document, empty if absent; raises `InputError` for any other value."""
    part = document.get(name)
    if part is None:
        return {}
    if not isinstance(part, dict):
        raise unusable(where, f"{name} to be a mapping", type(part).__name__)
    return part


def write_checkpoint(
    path: Path,
    *,
    step: int,
    state: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    optimizer_state: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint file in the reference trainer's layout, atomically."""
    with replace_file(path) as partial:
        torch.save(
            {
                "step": step,
                "model_state": dict(state),
                "optimizer_state": dict(optimizer_state or {}),
                "metrics": dict(metrics),
                "config": dict(config),
            },
            partial,
        )


def _load(file: HashedFile) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below says what is wrong with a file
            return torch.load(io.BytesIO(file.content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # One line names the global that the pickle asked for; the rest is advice to load it anyway.
        detail = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), str(error))
        expected = "a checkpoint of plain tensors that loads without executing anything"
        raise unusable(file.path, expected, detail) from None
    except Exception as error:  # a damaged file can make the unpickler raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise unusable(file.path, "a whole PyTorch checkpoint", f"a damaged file ({reason})") from None


def _as_float32(path: Path, name: object, tensor: object) -> np.ndarray:
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{path}: expected a tensor for {name}; found {type(tensor).__name__}")
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(f"{path}: expected float32 or half precision for {name}; found {tensor.dtype}")
    try:
        return tensor.detach().to(torch.float32).numpy()
    except (TypeError, RuntimeError) as error:  # sparse, or without storage
        raise unusable(path, f"a dense tensor for {name}", error) from None
