"""Reads checkpoints in threads, ahead of the devices that measure them."""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from kvjax.errors import InputError

_READERS = 8  # files read at once

Loaded = TypeVar("Loaded")


def load_ahead(
    names: Sequence[str],
    files: Mapping[str, tuple[int | None, Path]],
    load: Callable[[Path, int | None], Loaded],
    *,
    ahead: int,
    on_refused: Callable[[str, InputError], None] | None = None,
) -> Iterator[tuple[str, Loaded]]:
    """Yields the checkpoints of `names` in order, while threads read the next `ahead` of them.

    Args:
      names: which checkpoints.
      files: name -> (the step that the file's name states or None, checkpoint file).
      load: reads a file and checks its step; called from several threads.
      ahead: files that are being read, or wait, while one is used.
      on_refused: called with the name of an unusable checkpoint, which is then left out.

    Raises:
      InputError: a checkpoint cannot be used, and `on_refused` is None.
    """
    with concurrent.futures.ThreadPoolExecutor(max_workers=min(ahead, _READERS)) as readers:

        def read(name: str) -> concurrent.futures.Future[Loaded]:
            step, path = files[name]
            return readers.submit(load, path, step)

        upcoming = collections.deque(read(name) for name in names[:ahead])
        try:
            for index, name in enumerate(names):
                future = upcoming.popleft()
                if index + ahead < len(names):
                    upcoming.append(read(names[index + ahead]))
                try:
                    checkpoint = future.result()
                except InputError as error:
                    if on_refused is None:
                        raise
                    on_refused(name, error)
                    continue
                yield name, checkpoint
        finally:
            for future in upcoming:
                future.cancel()
