"""Opens the two file formats of `torch.save` from a file's bytes, and says what a file is that is neither.

Nothing is executed (see `inert_pickle`), and tensors stay views of the bytes (see `saved_tensors`).
"""

from __future__ import annotations

import dataclasses
import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

from kvjax.converters.inert_pickle import StorageType, read_pickle
from kvjax.converters.saved_tensors import SavedStorage, item_size

from kvjax.artifacts.files import HashedFile
from kvjax.errors import InputError, unusable

NO_CHECKSUMS = (
    "its file holds no checksums (torch.serialization.set_crc32_options), so that nothing vouches for its bytes"
)
OLD_FORMAT = "its file has the format before PyTorch 1.6, without checksums, so that nothing vouches for its bytes"

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip record: its mark, and how long the name and the extra field are
_OLD_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_OLD_VERSION = 1001

# What people have under the name of a checkpoint: the first bytes, what it is, and the remedy.
_OTHER_FILES: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer instead of the file (git lfs pull fetches it)"),
    (b"\x1f\x8b", "a gzip file (gunzip it)"),
    (b"\xfd7zXZ\x00", "an xz file (unxz it)"),
    (b"BZh", "a bzip2 file (bunzip2 it)"),
    (b"\x28\xb5\x2f\xfd", "a zstd file (unzstd it)"),
    (b"\x89HDF", "an HDF5 file, as Keras writes"),
    (b"\x93NUMPY", "a NumPy array (.npy)"),
    (b"GGUF", "a GGUF file, as llama.cpp reads"),
    (b"{", "a JSON file"),
)


@dataclasses.dataclass(frozen=True)
class Archive:
    """The content of a file that `torch.save` wrote.

    Attributes:
      document: the saved object: plain values, `SavedTensor`s, and `Opaque`s for everything else.
      notes: what a reader should know about the file.
    """

    document: Any
    notes: tuple[str, ...] = ()


def open_archive(file: HashedFile) -> Archive:
    """Reads the object that `torch.save` wrote into a file, and checks every record of it against its CRC-32.

    Raises:
      InputError: the file is damaged, or not written by `torch.save`.
    """
    if file.content.startswith(b"PK\x03\x04"):
        return _open_zip(file)
    found = _other_file(file.content)
    if found is not None:
        raise unusable(file.path, "a checkpoint written by torch.save", found)
    return _open_old(file)


def _other_file(content: bytes) -> str | None:
    if not content:
        return "an empty file (was saving interrupted?)"
    text = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page instead of the file (was a login or an error page downloaded?)"
    header = int.from_bytes(content[:8], "little")
    if content[8:9] == b"{" and 8 + header <= len(content):
        return "a safetensors file (load it with safetensors.torch.load_file, then torch.save the result)"
    if content[257:262] == b"ustar":
        return "a tar file (unpack it; PyTorch before 0.2 wrote checkpoints as tar files: load and save it there)"
    return next((what for start, what in _OTHER_FILES if content.startswith(start)), None)


def damaged(file: HashedFile, reason: object) -> InputError:
    """Makes the error about a file whose bytes are not those that were written."""
    return unusable(file.path, "a whole PyTorch checkpoint (copy or download it again)", f"a damaged file ({reason})")


# The format since PyTorch 1.6: a zip archive of a pickle and one uncompressed record per storage.


class _Records:
    """The records of a zip archive, checked against their CRC-32 and cut out of its bytes without a copy."""

    def __init__(self, content: bytes):
        self._content = memoryview(content)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            infos = archive.infolist()
        self._infos = {info.filename: info for info in infos}
        if len(self._infos) < len(infos):  # PyTorch reads the first of them, Python's zipfile the last
            raise ValueError("several records of one name")
        self.has_checksums = any(info.CRC for info in self._infos.values())
        for name, info in self._infos.items():
            # A compressed record is checked when it is read: what nothing needs takes no memory.
            if info.compress_type == zipfile.ZIP_STORED:
                self._check(name, self._stored(name))

    def names(self) -> list[str]:
        """Lists the records in the order of the directory."""
        return list(self._infos)

    def read(self, name: str) -> memoryview:
        """Gives a record's bytes; raises `ValueError` if there is none, or its checksum differs."""
        if name not in self._infos:
            raise ValueError(f"no record {name}")
        info, content = self._infos[name], self._stored(name)
        if info.compress_type == zipfile.ZIP_STORED:
            return content
        if info.compress_type != zipfile.ZIP_DEFLATED:
            raise ValueError(f"record {name} is compressed by method {info.compress_type}")
        try:
            inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, info.file_size)
        except zlib.error as error:
            raise ValueError(f"record {name}: {error}") from None
        return self._check(name, memoryview(inflated))

    def _stored(self, name: str) -> memoryview:
        info = self._infos[name]
        if info.flag_bits & 1:
            raise ValueError(f"record {name} is encrypted")
        start = info.header_offset
        mark, name_size, extra_size = _LOCAL_HEADER.unpack_from(self._content, start)
        start += _LOCAL_HEADER.size
        named = bytes(self._content[start : start + name_size])
        if mark != b"PK\x03\x04" or named != info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437"):
            raise ValueError(f"record {name} is not where the directory says")
        start += name_size + extra_size
        content = self._content[start : start + info.compress_size]
        if len(content) != info.compress_size:
            raise ValueError(f"record {name} is cut off")
        return content

    def _check(self, name: str, content: memoryview) -> memoryview:
        info = self._infos[name]
        if len(content) != info.file_size or (self.has_checksums and zlib.crc32(content) != info.CRC):
            raise ValueError(f"record {name} does not match its CRC-32")
        return content


def _open_zip(file: HashedFile) -> Archive:
    try:
        records = _Records(file.content)
    except Exception as error:  # a damaged directory can make zipfile raise anything
        raise damaged(file, error) from None
    top = _top_folder(file, records.names())
    try:
        byte_order = bytes(records.read(f"{top}/byteorder")) if f"{top}/byteorder" in records.names() else b"little"
        content = bytes(records.read(f"{top}/data.pkl"))
    except ValueError as error:
        raise damaged(file, error) from None
    if byte_order != b"little":
        raise unusable(file.path, "numbers in little-endian order", byte_order[:20].decode("ascii", "replace"))

    def find_storage(kind: StorageType, key: Any, _: Any, numel: Any, *__: Any) -> SavedStorage:
        return SavedStorage(kind.dtype, numel, lambda: records.read(f"{top}/data/{key}"))

    try:
        document = read_pickle(io.BytesIO(content), find_storage)
    except Exception as error:  # a damaged pickle can make the unpickler raise anything
        raise damaged(file, error or type(error).__name__) from None
    return Archive(document, () if records.has_checksums else (NO_CHECKSUMS,))


def _top_folder(file: HashedFile, names: list[str]) -> str:
    """Finds the folder inside an archive that `torch.save` put everything into."""
    expected = "a checkpoint written by torch.save"
    tops = [name.removesuffix("/data.pkl") for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if any(name.split("/")[1:2] == ["constants.pkl"] for name in names):
        raise unusable(file.path, expected, "a TorchScript archive (torch.save the state_dict() of torch.jit.load)")
    if len(tops) == 1:
        return tops[0]
    if any(name.endswith((".npy", "/.zarray")) for name in names):
        raise unusable(file.path, expected, "a zip archive of NumPy arrays")
    if any("archive_format" in name or name.endswith(".pt2") for name in names):
        raise unusable(file.path, expected, "a torch.export archive (torch.save the state_dict() of the program)")
    listed = ", ".join(names[:3]) or "nothing"
    raise unusable(file.path, expected, f"a zip archive of other files ({listed})")


# The format before: pickles one after the other, then the storages' bytes.


def _open_old(file: HashedFile) -> Archive:
    stream = io.BytesIO(file.content)
    try:
        magic_number = read_pickle(stream, _no_storage)
    except Exception:
        raise unusable(file.path, "a checkpoint written by torch.save", "a file of another kind, or damage") from None
    if magic_number != _OLD_MAGIC_NUMBER:
        found = "a pickle that torch.save did not write (nothing in it was executed)"
        raise unusable(file.path, "a checkpoint written by torch.save", found)
    storages = _OldStorages(file.content)
    try:
        version, system = read_pickle(stream, _no_storage), read_pickle(stream, _no_storage)
        if version != _OLD_VERSION or not system["little_endian"]:
            raise ValueError(f"version {version} of {system}")
        document = read_pickle(stream, storages.find)
        storages.locate(read_pickle(stream, _no_storage), stream.tell())
    except Exception as error:  # a damaged pickle can make the unpickler raise anything
        raise damaged(file, error or type(error).__name__) from None
    return Archive(document, (OLD_FORMAT,))


def _no_storage(*_: Any) -> SavedStorage:
    raise pickle.UnpicklingError("a storage outside the saved object")


class _OldStorages:
    """The storages that stand behind the pickles of the older format."""

    def __init__(self, content: bytes):
        self._content = memoryview(content)
        self._named: dict[str, SavedStorage] = {}
        self._places: Mapping[str, memoryview] = {}

    def find(self, kind: StorageType, key: Any, _: Any, numel: Any, view: Any = None, *__: Any) -> SavedStorage:
        """Makes the storage of a key; a view of a part of it is of PyTorch before 0.4."""
        whole = self._named.setdefault(key, SavedStorage(kind.dtype, numel, lambda: self._places[key]))
        if view is None:
            return whole
        item, (_, offset, size) = item_size(kind.dtype), view
        part = slice(offset * item, (offset + size) * item)
        return SavedStorage(kind.dtype, size, lambda: whole.read()[part])

    def locate(self, keys: list[str], start: int) -> None:
        """Finds where the bytes of each storage are.

        Raises:
          ValueError: there are fewer bytes than the storages have, or more.
        """
        places = {}
        for key in keys:
            (numel,) = struct.unpack_from("<q", self._content, start)
            storage = self._named[key]
            end = start + 8 + numel * item_size(storage.dtype)
            if numel != storage.numel or end > len(self._content):
                raise ValueError(f"storage {key} is cut off, or not of {storage.numel} elements")
            places[key] = self._content[start + 8 : end]
            start = end
        if start != len(self._content):
            raise ValueError(f"{len(self._content) - start} bytes behind the last tensor")
        self._places = places
