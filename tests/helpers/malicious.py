"""Checkpoint files that would run code if they were unpickled."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.target,))


def write_malicious(path: Path, target: Path) -> None:
    """Writes a zip checkpoint whose pickle would run code."""
    torch.save({"step": 1, "model_state": {}}, path)
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(buffer, "w") as out:
        for item in source.namelist():
            data = source.read(item)
            out.writestr(item, pickle.dumps(Bomb(target)) if item.endswith("data.pkl") else data)
    path.write_bytes(buffer.getvalue())
