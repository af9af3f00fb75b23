"""Reading and writing `.pt` checkpoints without ever executing what is in them."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvjax.artifacts.files import replace_file
from kvjax.errors import InputError, unusable


@dataclasses.dataclass(frozen=True)
class TorchCheckpoint:
    """A `.pt` file's content.

    Attributes:
      sha256: of the bytes that everything else was read from.
      step: the training step it was saved at.
      state: `model_state`, tensor name -> float32 array.
      config: `train_spec`, `benchmark_metadata`, …, as the trainer recorded them; empty where it did not.
      metrics: evaluation results stored with it, by split; often empty.
      optimizer_state: as PyTorch's optimiser saved it; empty where it did not.
    """

    sha256: str
    step: int
    state: Mapping[str, np.ndarray]
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    optimizer_state: Mapping[str, Any]


def read_checkpoint(path: Path) -> TorchCheckpoint:
    """Returns the content of a checkpoint file, half precision widened to float32.

    Raises:
      InputError: there is no such file, it is damaged, it would need arbitrary unpickling (nothing of it is
        executed), or it is not a checkpoint.
    """
    # Read once: a trainer may write the file anew at any time, and the hash must be of what was loaded.
    content = _read(path)
    document = _load(path, content)
    if not isinstance(document, dict) or not isinstance(document.get("model_state"), dict):
        found = sorted(map(str, document))[:6] if isinstance(document, dict) else type(document).__name__
        raise unusable(path, "a checkpoint with step and model_state", found)
    step = document.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise unusable(path, "a step that is a whole number", step)
    return TorchCheckpoint(
        sha256=hashlib.sha256(content).hexdigest(),
        step=step,
        state={str(name): _as_float32(path, name, t) for name, t in document["model_state"].items()},
        config=section(document, "config", path),
        metrics=section(document, "metrics", path),
        optimizer_state=section(document, "optimizer_state", path),
    )


def section(document: Mapping[str, Any], name: str, where: object) -> Mapping[str, Any]:
    """Returns a part of a document that is a mapping, empty where absent; raises `InputError` for another kind."""
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


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise unusable(path, "a PyTorch checkpoint", "no such file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise unusable(path, "a PyTorch checkpoint that can be read", error) from None


def _load(path: Path, content: bytes) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a file is said once, in the error
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # The first line says what the pickle asked for; the rest is advice to load it anyway.
        detail = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), str(error))
        raise unusable(path, "a checkpoint of plain tensors that loads without executing anything", detail) from None
    except Exception as error:  # a damaged file can make the unpickler raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise unusable(path, "a whole PyTorch checkpoint", f"a damaged file ({reason})") from None


def _as_float32(path: Path, name: object, tensor: object) -> np.ndarray:
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{path}: expected a tensor for {name}; found {type(tensor).__name__}")
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(f"{path}: expected float32 or half precision for {name}; found {tensor.dtype}")
    try:
        return tensor.detach().to(torch.float32).numpy()
    except (TypeError, RuntimeError) as error:  # sparse, or without storage
        raise unusable(path, f"a dense tensor for {name}", error) from None
