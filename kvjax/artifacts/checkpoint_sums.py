"""Keep the measured sums of each checkpoint, and find them again if file, probe set and settings are the same."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.artifacts.files import digest, file_sha256, replace_file
from kvjax.errors import unusable

Arrays = Mapping[str, np.ndarray]

_INFO = "info"
# Of a zip file. A member's: signature, …, CRC, sizes, lengths of name and extra field. The last: signature, …, size and
# offset of the directory, length of a comment.
_LOCAL_HEADER, _END_OF_ARCHIVE = struct.Struct("<4s5H3I2H"), struct.Struct("<4s4H2IH")


@dataclasses.dataclass(frozen=True)
class CheckpointResult:
    """The measured sums of one checkpoint.

    Attributes:
      step: its training step.
      arrays: measured arrays by name; empty if they are left in the file.
      info: provenance: the file and its hash, the certificate, the time it took, the device.
    """

    step: int
    arrays: Arrays
    info: Mapping[str, Any]

    def without_arrays(self) -> CheckpointResult:
        """Drops the arrays: those of a long run would fill the memory."""
        return dataclasses.replace(self, arrays={})


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
            arrays = _read_npz(self._path(name))
            info = json.loads(str(arrays.pop(_INFO)))
            if info["fingerprint"] != self._fingerprint(key):
                return None
        except Exception:  # NumPy and zipfile raise many kinds for a missing or damaged file
            return None
        return CheckpointResult(int(info["step"]), arrays, info)

    def read_again(self, name: str, key: str, checkpoint: Path) -> CheckpointResult:
        """Reads a result that was there before.

        Args:
          name, key: as `find` takes them.
          checkpoint: the file that it was measured on, for the error.

        Raises:
          InputError: it was lost since.
        """
        found = self.find(name, key)
        if found is None:
            expected = "what was measured on it in `measured` (run the sweep again)"
            raise unusable(checkpoint, expected, f"that {self._path(name).name} was lost meanwhile")
        return found

    def holds(self, name: str, key: str) -> bool:
        """Checks by its provenance whether `find` would return a result; reads no arrays."""
        try:
            return json.loads(str(_read_first(self._path(name))))["fingerprint"] == self._fingerprint(key)
        except Exception:  # as above
            return False

    def has_file(self, name: str) -> bool:
        """Checks whether there is a result of a name, of whatever file and settings; opens none."""
        return self._path(name).is_file()

    def look_again(self) -> None:
        """Lists the folder, so that a network file system shows what other machines have written since."""
        if self.folder.is_dir():
            os.listdir(self.folder)

    def load(self, name: str, checkpoint: Path) -> CheckpointResult | None:
        """Hashes a checkpoint file and reads its stored result; None if there is no valid one."""
        if not self.has_file(name) or not checkpoint.is_file():
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


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of an uncompressed `.npz` file, read-only, and compares each with its checksum.

    It takes a sixth of the time of `np.load`, which opens and parses every one of 50 small arrays by itself.

    Raises:
      Exception: of many kinds, if the file is missing or damaged.
    """
    content = path.read_bytes()
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for member in archive.infolist():
            local = content[member.header_offset : member.header_offset + _LOCAL_HEADER.size]
            signature, *_, name_length, extra_length = _LOCAL_HEADER.unpack(local)
            name = member.header_offset + _LOCAL_HEADER.size
            begin = name + name_length + extra_length
            array = content[begin : begin + member.file_size]
            stored = signature == b"PK\3\4" and content[name : name + name_length] == member.filename.encode()
            if not stored or member.compress_type != zipfile.ZIP_STORED or zlib.crc32(array) != member.CRC:
                raise zipfile.BadZipFile(member.filename)
            length = 10 + int.from_bytes(array[8:10], "little")
            shape, in_columns, dtype = _npy_header(array[:length])
            values = np.frombuffer(array, dtype, offset=length).reshape(shape, order="F" if in_columns else "C")
            arrays[member.filename.removesuffix(".npy")] = values
    return arrays


def _read_first(path: Path) -> np.ndarray:
    """Reads the first array of an `.npz` file, where `save` puts provenance, and checks that the file is not cut off.

    `np.load` parses the directory of all arrays, with which `holds` takes three times as long.

    Raises:
      Exception: of many kinds, if the file is missing or damaged.
    """
    with path.open("rb") as file:
        signature, *_, crc, _, _, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        begin = file.seek(name_length + extra_length, os.SEEK_CUR)
        array = np.lib.format.read_array(file, allow_pickle=False)
        length = file.tell() - begin
        file.seek(begin)
        if signature != b"PK\3\4" or zlib.crc32(file.read(length)) != crc:
            raise zipfile.BadZipFile("first member")
        end = file.seek(-_END_OF_ARCHIVE.size, os.SEEK_END)
        signature, *_, size, offset, comment = _END_OF_ARCHIVE.unpack(file.read())
        if signature != b"PK\5\6" or offset + size != end or comment:
            raise zipfile.BadZipFile("end")
    return array


@functools.lru_cache(maxsize=1024)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Parses the header of an array: shape, whether columns come first, type. A run's checkpoints have equal ones."""
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("version of the npy format")
    return np.lib.format.read_array_header_1_0(file)
