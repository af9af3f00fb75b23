"""Keep the measured sums of each checkpoint, and find them again if file, probe set and settings are the same."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.artifacts.files import digest, file_sha256, replace_file

Arrays = Mapping[str, np.ndarray]

_INFO = "info"


@dataclasses.dataclass(frozen=True)
class CheckpointResult:
    """The measured sums of one checkpoint.

    Attributes:
      step: its training step.
      arrays: measured arrays by name.
      info: provenance: the file and its hash, the certificate, the time it took, the device.
    """

    step: int
    arrays: Arrays
    info: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ResultStore:
    """A folder of measured sums, one `.npz` per checkpoint.

    A stored result counts as missing if its identity or its checkpoint file differs, or if it is damaged.

    Attributes:
      folder: the folder.
      identity: everything but the checkpoint file that a result depends on: settings and hashes.
    """

    folder: Path
    identity: Mapping[str, Any]

    def find(self, name: str, key: str) -> CheckpointResult | None:
        """Reads the result of a name; None unless it was measured on the file whose hash is `key`."""
        try:
            with np.load(self._path(name), allow_pickle=False) as stored:
                info = json.loads(str(stored[_INFO]))
                if info["fingerprint"] != self._fingerprint(key):
                    return None
                arrays = {key: stored[key] for key in stored.files if key != _INFO}
        except Exception:  # NumPy and zipfile raise many kinds for a missing or damaged file
            return None
        return CheckpointResult(int(info["step"]), arrays, info)

    def holds(self, name: str, key: str) -> bool:
        """Checks by its provenance whether `find` would return a result; reads no arrays."""
        try:
            with np.load(self._path(name), allow_pickle=False) as stored:
                return json.loads(str(stored[_INFO]))["fingerprint"] == self._fingerprint(key)
        except Exception:  # as above
            return False

    def load(self, name: str, checkpoint: Path) -> CheckpointResult | None:
        """Hashes a checkpoint file and reads its stored result; None if there is no valid one."""
        if not self._path(name).is_file() or not checkpoint.is_file():
            return None
        return self.find(name, file_sha256(checkpoint))

    def save(self, name: str, key: str, step: int, arrays: Arrays, info: Mapping[str, Any]) -> CheckpointResult:
        """Writes a result atomically and returns it; `key` is the hash of the checkpoint file."""
        info = {**info, "step": step, "fingerprint": self._fingerprint(key)}
        with replace_file(self._path(name), durable=False) as partial, partial.open("wb") as file:
            np.savez(file, **{_INFO: np.array(json.dumps(info, sort_keys=True))}, **arrays)
        return CheckpointResult(step, arrays, info)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"

    def _fingerprint(self, key: str) -> str:
        return digest({**self.identity, "checkpoint": key})
