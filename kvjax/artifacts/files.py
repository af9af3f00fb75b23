"""Read, write and hash plain files; every write replaces a file or a directory whole, or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kvjax.config.json_text import parse_json, parse_json_lines, read_bytes
from kvjax.errors import InputError, unusable


def _read_umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


_UMASK = _read_umask()  # at once: reading it sets it, for all threads


def read_json(path: Path) -> Any:
    """Reads a JSON file; raises `InputError` if it is missing or no JSON."""
    return parse_json(read_bytes(path, "a JSON file"), path, "a JSON file")


def read_json_lines(path: Path) -> list[Any]:
    """Reads a JSON-lines file, a document per line; raises `InputError` naming the first bad line."""
    return parse_json_lines(read_bytes(path, "a JSON-lines file"), path)


def write_json(path: Path, document: Any) -> None:
    """Writes strict, indented JSON atomically; raises `ValueError` for NaN and infinities."""
    with replace_file(path) as partial:
        text = json.dumps(document, indent=2, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")


def write_json_lines(path: Path, documents: Iterable[Any]) -> None:
    """Writes strict JSON atomically, one object per line."""
    with replace_file(path) as partial, partial.open("w", encoding="utf-8") as lines:
        for document in documents:
            lines.write(json.dumps(document, allow_nan=False) + "\n")


# What writing fails with, whatever is written: no room, a quota, a limit of size, a broken disk, no permission.
_WRITING_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}


@contextlib.contextmanager
def _blaming(path: Path, partial: Path, expected: str) -> Iterator[None]:
    """Turns errors of writing `partial` into the `InputError` that names `path`, which people know."""
    try:
        yield
    except InputError as error:  # of a file within a directory
        raise InputError(str(error).replace(str(partial), str(path)), parameter=error.parameter) from None
    except OSError as error:
        own = error.filename is None or Path(str(error.filename)).is_relative_to(partial)
        if not own or error.errno not in _WRITING_ERRORS:
            raise
        raise unusable(path, expected, error.strerror) from None


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; replaces `path` with it if the block ends without an error.

    Raises:
      InputError: the disk is full, or the file cannot be written for another reason that the system gives.
    """
    expected = "a file that can be written"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise unusable(path, expected, error) from None
    os.close(handle)
    partial = Path(name)
    try:
        with _blaming(path, partial, expected):
            yield partial
        try:
            partial.chmod(0o666 & ~_UMASK)  # mkstemp makes it private; results are for sharing
            partial.replace(path)
        except OSError as error:
            raise unusable(path, expected, error.strerror) from None
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_directory(path: Path) -> Iterator[Path]:
    """Yields an empty directory to fill; replaces `path` with it if the block ends without an error.

    Raises:
      InputError: the disk is full, or the directory cannot be written for another reason that the system gives.
    """
    expected = "a directory that can be written"
    path = path.resolve()  # `.` has no name to put another directory beside
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise unusable(path, expected, error) from None
    try:
        with _blaming(path, partial, expected):
            yield partial
        partial.chmod(0o777 & ~_UMASK)
        if path.exists():
            # The old one goes only after the new one stands in its place.
            retired = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)) / "old"
            path.rename(retired)
            try:
                partial.rename(path)
            except OSError:
                retired.rename(path)
                raise
            finally:
                shutil.rmtree(retired.parent)
        else:
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """Hashes a file's bytes with SHA-256 and returns hexadecimal digits."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unusable(path, "a file that can be read", error) from None


@dataclasses.dataclass(frozen=True)
class HashedFile:
    """A file's bytes and their SHA-256.

    The file is read once: a trainer may write it again at any time, and the hash must be that of the bytes in use.
    """

    path: Path
    content: bytes = dataclasses.field(repr=False)
    sha256: str

    @classmethod
    def read(cls, path: Path, kind: str) -> HashedFile:
        """Reads a file; raises `InputError` if it cannot be read. `kind` names it in the message, as "a checkpoint"."""
        if path.is_symlink() and not path.exists():
            raise unusable(path, kind, f"a link to {path.readlink()}, which does not exist")
        if path.is_dir():
            raise unusable(path, kind, "a directory")
        if not path.is_file():
            raise unusable(path, kind, "no such file")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise unusable(path, f"{kind} that can be read", error) from None
        return cls(path, content, hashlib.sha256(content).hexdigest())


def digest(document: Any) -> str:
    """Hashes a JSON document with SHA-256, whatever the order of its keys, and returns hexadecimal digits."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class FileHash:
    """A file's content as another file records it.

    Attributes:
      sha256: of its bytes, as hexadecimal digits.
      bytes: how many there are; a truncated file is found by them without hashing it.
    """

    sha256: str
    bytes: int

    @classmethod
    def of(cls, path: Path) -> FileHash:
        """Hashes a file."""
        return cls(file_sha256(path), path.stat().st_size)

    def check(self, path: Path, *, recorded_in: Path, remedy: str) -> None:
        """Checks that a file still has this content, without parsing it: libraries may hang on a damaged one.

        Args:
          path: the file.
          recorded_in: the file that holds this record, for the error.
          remedy: the command that writes the file again, for the error.

        Raises:
          InputError: the file is missing, or has another content.
        """
        expected = f"the {self.bytes} bytes, SHA-256 {self.sha256[:12]}, that {recorded_in.name} records ({remedy})"
        try:
            size = path.stat().st_size
        except OSError:
            raise unusable(path, expected, "no such file") from None
        if size != self.bytes:
            raise unusable(path, expected, f"{size} bytes")
        if (sha256 := file_sha256(path)) != self.sha256:
            raise unusable(path, expected, f"SHA-256 {sha256[:12]}")
