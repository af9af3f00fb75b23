"""Read, write and hash plain files; every write replaces a file or a directory whole, or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from kvjax.artifacts.partials import partial_file, partial_folder, put_folder_in_place
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


# What writing fails with, whatever is written: no room, a quota, a limit of size, a broken disk, no permission.
_WRITING_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
_FILE, _DIRECTORY = "a file that can be written", "a directory that can be written"


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


class Replacements:
    """Files that are written beside those they replace, and put in their places together by `replace_together`.

    Args:
      held: keeps the partial files until they are in place.
      durable: see `replace_file`.
    """

    def __init__(self, held: contextlib.ExitStack, *, durable: bool):
        self._held, self._durable = held, durable
        self._partials: dict[Path, Path] = {}

    @contextlib.contextmanager
    def file(self, path: Path) -> Iterator[Path]:
        """Yields a path to write to, which is to replace `path`.

        Raises:
          InputError: the file cannot be written.
        """
        try:
            partial = self._held.enter_context(partial_file(path))
        except OSError as error:
            raise unusable(path, _FILE, error) from None
        with _blaming(path, partial, _FILE):
            yield partial
            partial.chmod(0o666 & ~_UMASK)  # a partial file is private; results are for sharing
            if self._durable:
                _sync_file(partial)  # a network's disk may say only now that it is full
        self._partials[path] = partial

    def hash(self, path: Path) -> FileHash:
        """Hashes what is to replace a file."""
        return FileHash.of(self._partials[path])

    def put_in_place(self) -> None:
        """Replaces the files in the order they were written; the last one only when the others are on the disk.

        Raises:
          InputError: a file cannot be replaced; those before it are.
        """
        *others, last = self._partials
        for path in others:
            self._replace(path)
        if self._durable:
            for folder in {path.parent for path in others}:
                _sync_folder(folder)
        self._replace(last)
        if self._durable:
            _sync_folder(last.parent)

    def _replace(self, path: Path) -> None:
        try:
            self._partials[path].replace(path)
        except OSError as error:
            raise unusable(path, _FILE, error.strerror) from None


@contextlib.contextmanager
def replace_together(*, durable: bool = True) -> Iterator[Replacements]:
    """Yields where to write files that belong together; none of them is replaced if the block ends with an error.

    They are replaced by one renaming after another, in the order they were written, so the last should hold the hashes
    of the others: what a kill between two renamings leaves is then found out.

    Raises:
      InputError: a file cannot be written or replaced.
    """
    with contextlib.ExitStack() as held:
        files = Replacements(held, durable=durable)
        yield files
        files.put_in_place()


@contextlib.contextmanager
def replace_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields a path beside `path` to write to; replaces `path` with it if the block ends without an error.

    Args:
      path: the file.
      durable: whether the file is on the disk before it replaces another. A file that counts as missing if a power cut
        damages it need not be: it takes 5 ms.

    Raises:
      InputError: the disk is full, or the file cannot be written for another reason that the system gives.
    """
    with replace_together(durable=durable) as files, files.file(path) as partial:
        yield partial


@contextlib.contextmanager
def replace_directory(path: Path) -> Iterator[Path]:
    """Yields an empty directory to fill; replaces `path` with it if the block ends without an error.

    Raises:
      InputError: the disk is full, or the directory cannot be written for another reason that the system gives.
    """
    path = path.resolve()  # `.` has no name to put another directory beside
    with contextlib.ExitStack() as held:
        try:
            partial = held.enter_context(partial_folder(path))
        except OSError as error:
            raise unusable(path, _DIRECTORY, error) from None
        with _blaming(path, partial, _DIRECTORY):
            yield partial
            for folder, _, names in os.walk(partial):
                for name in names:
                    _sync_file(Path(folder, name))
                _sync_folder(Path(folder))
        try:
            put_folder_in_place(partial, path)
        except OSError as error:
            raise unusable(path, _DIRECTORY, error.strerror) from None
        _sync_folder(path.parent)


def _sync_file(path: Path) -> None:
    """Waits until a file's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    """Waits until the names in a folder are on the disk, if its file system can tell."""
    with contextlib.suppress(OSError):
        _sync_file(path)


# Opens a file to write to that is to replace the one of a path: `replace_file`, or `Replacements.file`.
Replace = Callable[[Path], contextlib.AbstractContextManager[Path]]


def write_json(path: Path, document: Any, *, replace: Replace = replace_file) -> None:
    """Writes strict, indented JSON atomically; raises `ValueError` for NaN and infinities."""
    with replace(path) as partial:
        text = json.dumps(document, indent=2, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")


def write_json_lines(path: Path, documents: Iterable[Any], *, replace: Replace = replace_file) -> None:
    """Writes strict JSON atomically, one object per line."""
    with replace(path) as partial, partial.open("w", encoding="utf-8") as lines:
        for document in documents:
            lines.write(json.dumps(document, allow_nan=False) + "\n")


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
