"""Checkpoint files of a small decoder for tests of reading them, and what reading one gives."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from kvjax.converters.to_flax import to_flax
from kvjax.converters.torch_checkpoint import TorchCheckpoint, parse_checkpoint

from kvjax.artifacts.files import HashedFile
from kvjax.config.run import ModelConfig
from tests.helpers.building import SMALL_MODEL, random_torch_model

VOCAB = 40
MODEL = ModelConfig.model_validate(SMALL_MODEL)


def small_state(*, tied: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """Returns the state dict of a small decoder."""
    return dict(random_torch_model(SMALL_MODEL, VOCAB, seed, tied=tied).state_dict())


def saved(document: Any, **given: Any) -> bytes:
    """Returns the bytes that `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(document, buffer, **given)
    return buffer.getvalue()


def parse(content: bytes, step: int | None = None) -> TorchCheckpoint:
    """Parses a checkpoint file's bytes."""
    return parse_checkpoint(HashedFile(Path("step.pt"), content, ""), step)


def params_of(checkpoint: TorchCheckpoint) -> Any:
    """Returns the parameters of a checkpoint of the small decoder."""
    return to_flax(checkpoint.state, MODEL, VOCAB, where=checkpoint.path)


def expected_params(state: dict[str, torch.Tensor]) -> Any:
    """Returns the parameters of a state dict that no file held."""
    return to_flax({name: tensor.float().numpy() for name, tensor in state.items()}, MODEL, VOCAB, where="memory")


def same(a: Any, b: Any) -> bool:
    """Says whether two parameter trees are equal bit by bit."""
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
        jax.tree.map(lambda x, y: x.dtype == y.dtype and x.tobytes() == np.asarray(y).tobytes(), a, b)
    )


STATE = small_state()
PLAIN = expected_params(STATE)


def envelope(**changes: Any) -> dict[str, Any]:
    """Returns the document of the plain file, with changes."""
    return {"step": 250, "model_state": STATE} | changes


def opens_as_plain(content: bytes, *, step: int | None = None) -> TorchCheckpoint:
    """Parses a file that must hold the plain file's parameters; returns it."""
    checkpoint = parse(content, step)
    assert same(params_of(checkpoint), PLAIN) and checkpoint.step == 250
    return checkpoint


def renamed(state: dict[str, torch.Tensor], change: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """Returns a state dict with every name changed."""
    return {change(name): tensor for name, tensor in state.items()}


def rezipped(content: bytes, *, compression: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    """Returns an archive written again by another tool, with more records in its folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w", compression) as out:
        for name in source.namelist():
            out.writestr(name, source.read(name))
        for name, record in more.items():
            out.writestr(f"archive/{name}", record, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
