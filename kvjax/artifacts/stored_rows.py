"""The rows of a JSON-lines table, parsed when they are asked for: those of a long run would fill the memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from kvjax.errors import unusable

Row = dict[str, Any]


class StoredRows(Sequence[Row]):
    """The rows of a file, in order.

    Args:
      path: the file; it must stay as it is.

    Raises:
      InputError: when rows are asked for, and the file was replaced or changed since.
    """

    def __init__(self, path: Path):
        self._path = path
        self._state = _state(path)
        with path.open("rb") as lines:
            lengths = np.fromiter(map(len, lines), np.int64)
        self._begins = np.concatenate([[0], np.cumsum(lengths)])

    def __len__(self) -> int:
        return len(self._begins) - 1

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        begin = int(self._begins[:-1][index])
        self._check()
        with self._path.open("rb") as lines:
            lines.seek(begin)
            return json.loads(lines.readline())

    def __iter__(self) -> Iterator[Row]:
        self._check()
        with self._path.open("rb") as lines:
            yield from map(json.loads, lines)

    def _check(self) -> None:
        if _state(self._path) != self._state:
            raise unusable(self._path, "the table as the sweep wrote it", "that it was written again since")


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
