"""Runs loaded through their parameter store, and counts of what that converts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import kvjax.converters.cached_loader
import kvjax.converters.convert
import numpy as np
import pytest
from kvjax.converters.cached_loader import CachedLoader
from kvjax.converters.parameter_store import read_stored_run

from kvjax.artifacts.run_dir import RunDir
from kvjax.model.checkpoint import Checkpoint

TOKENS = np.array([[1, 8, 10, 14, 2]], np.int32)


def load_all(loader: CachedLoader, small_run: Path) -> list[Checkpoint]:
    """Loads and stores every step checkpoint of a run."""
    loaded = [loader.load(path, step) for step, path in RunDir.open(small_run).checkpoints.items()]
    loader.save()
    return loaded


def same_params(a: Checkpoint, b: Checkpoint) -> bool:
    """Checks whether two checkpoints have the same parameters, bit by bit."""
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a.params, b.params))


def stored_steps(folder: Path) -> list[int]:
    """Returns the steps that a store holds."""
    return [checkpoint.step for checkpoint in read_stored_run(folder)]


class Conversions:
    """Counts the files that are converted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: list[str] = []
        real = kvjax.converters.convert.convert_checkpoint

        def counted(path: Path, *args: Any, **kwargs: Any) -> Checkpoint:
            self.files.append(path.name)
            return real(path, *args, **kwargs)

        monkeypatch.setattr(kvjax.converters.convert, "convert_checkpoint", counted)


def hold_at_most(
    monkeypatch: pytest.MonkeyPatch, loader: Callable[..., CachedLoader], small_run: Path, checkpoints: int
) -> None:
    """Lets a loader hold so many checkpoints before it writes them."""
    size = loader(keep="nothing").load(RunDir.open(small_run).checkpoints[100], 100).nbytes
    monkeypatch.setattr(kvjax.converters.cached_loader, "_HELD_BYTES", checkpoints * size)
