"""Runs a compiled function over any number of checkpoints, in chunks of one fixed size."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import jax
import numpy as np

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Chunk(Generic[Item]):
    """A chunk that the devices are done with.

    Attributes:
      items: the checkpoints of the chunk, at most as many as the chunk size.
      outputs: a tree of NumPy arrays, [len(items), …] each.
      seconds: the devices' time: since the chunk was dispatched, or since they finished the one before.
    """

    items: list[Item]
    outputs: Any
    seconds: float


def over_chunks(
    dispatch: Callable[[list[Item]], Any], items: Iterable[Item], *, size: int, in_flight: int = 1
) -> Iterator[Chunk[Item]]:
    """Dispatches checkpoints in chunks of `size` and yields each chunk once its outputs have arrived.

    The first chunk is handed on before the next is dispatched, since a person waits for it. The last is padded by
    repeating its last item, since another number of checkpoints would be another program to compile. If reading the
    items fails, the items read before are measured and yielded before the error is raised.

    Args:
      dispatch: starts the devices on exactly `size` items and returns a tree of their arrays, [size, …] each, without
        waiting for them.
      items: the checkpoints, in order; read no further ahead than chunks are dispatched.
      size: checkpoints per call.
      in_flight: chunks that are dispatched before the outputs of the one before them are waited for, after the first.
    """
    running: collections.deque[tuple[list[Item], Any, float]] = collections.deque()
    free_since = -np.inf  # when the devices had finished the chunk before

    def finish() -> Chunk[Item]:
        nonlocal free_since
        chunk, outputs, dispatched = running.popleft()
        # Cut on the host: a slice on the devices is a program of its own.
        cut = jax.tree.map(lambda x: x[: len(chunk)], jax.device_get(outputs))
        finished = time.perf_counter()
        seconds, free_since = finished - max(dispatched, free_since), finished
        return Chunk(chunk, cut, seconds)

    try:
        for chunk in _chunks(items, size):
            dispatched = time.perf_counter()
            running.append((chunk, dispatch([*chunk, *chunk[-1:] * (size - len(chunk))]), dispatched))
            if len(running) > (in_flight if free_since > 0 else 0):
                yield finish()
    except (Exception, KeyboardInterrupt):
        while running:
            yield finish()
        raise
    while running:
        yield finish()


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields items in lists of `size`, the last one shorter; if reading fails, those read before the error."""
    chunk: list[Item] = []
    try:
        for item in items:
            chunk.append(item)
            if len(chunk) == size:
                yield chunk
                chunk = []
    except Exception:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def checkpoints_of(stacked: Any) -> Iterator[Any]:
    """Yields the tree of each checkpoint from a tree of arrays [C, …]."""
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, stacked))
    for of_checkpoint in zip(*leaves, strict=True):
        yield jax.tree.unflatten(structure, of_checkpoint)


def stack_trees(trees: list[Any]) -> Any:
    """Stacks the trees of several checkpoints into one tree of arrays with a leading axis C."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
