"""A disk that fills up, or cannot be written, from one of a command's operations on files on."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvjax.artifacts import partials

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_PLACES = {"open": 0, "os.mkdir": 0, "os.rename": 1}  # operation -> which argument a full disk has no room for
_HIDDEN = re.compile(r"^\.(.+)\.[a-z0-9_]{8}\.kvjax-partial(\.new)?$")


class _Disk:
    """Hears of every operation of this process; a hook cannot be removed, so that there is one, which is mostly idle.

    Attributes:
      root: operations below it count.
      fails_from: number of the first one that fails, and all later ones with it; None for a sound disk.
      code: what the system answers then.
      operations: the names of the files and folders that were to be made, in order.
    """

    def __init__(self) -> None:
        self.root: str | None = None
        self.fails_from: int | None = None
        self.code = errno.ENOSPC
        self.operations: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.root is None or event not in _PLACES:
            return
        if event == "open" and not (arguments[2] or 0) & _WRITING:
            return
        path = arguments[_PLACES[event]]
        if not isinstance(path, str | os.PathLike) or not str(path).startswith(self.root):
            return
        self.operations.append(_shown(Path(path).name))
        if self.fails_from is not None and len(self.operations) >= self.fails_from:
            raise OSError(self.code, os.strerror(self.code), str(path))


_disk: _Disk | None = None


@contextmanager
def disk_below(root: Path, *, fails_from: int | None = None, code: int = errno.ENOSPC) -> Iterator[list[str]]:
    """Watches a folder, and lets its disk fail from an operation on; yields the list of what was to be made."""
    global _disk
    _disk = _disk or _Disk()
    _disk.root, _disk.fails_from, _disk.code, _disk.operations = str(root), fails_from, code, []
    try:
        yield _disk.operations
    finally:
        _disk.root = None


def first_of_each(operations: list[str]) -> list[int]:
    """Lists the numbers, from 1, of the first operation on each kind of file: steps are one, figures another."""
    kinds: dict[str, int] = {}
    for number, name in enumerate(operations, start=1):
        suffix = Path(name).suffix
        kinds.setdefault(suffix if suffix in (".png", ".svg") else re.sub(r"\d+", "0", name), number)
    return list(kinds.values())


def _shown(name: str) -> str:
    """Names the file that a hidden one is to become."""
    return match[1] if (match := _HIDDEN.fullmatch(name)) else name


class FullFiles:
    """Counts the files that are written below a folder, and lets those from a number on take no byte (/dev/full).

    Attributes:
      writes: the names of the files, in order.
      full_from: the number, from 1; None for a sound disk.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path):
        self.writes: list[str] = []
        self.full_from: int | None = None
        make = partials._make_locked

        def make_locked(target: Path) -> tuple[int, Path]:
            descriptor, path = make(target)
            if target.is_relative_to(root):
                self.writes.append(target.name)
                if self.full_from is not None and len(self.writes) >= self.full_from:
                    path.unlink()
                    path.symlink_to("/dev/full")
            return descriptor, path

        monkeypatch.setattr(partials, "_make_locked", make_locked)
