"""Caches lowered programs beside JAX's cache of compiled ones.

JAX's cache is keyed by the lowered program, which every process traces and lowers anew: 2 to 3 s for a sweep. Here the
key is everything that the lowered program is made from, so that it is not traced again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kvjax.artifacts.code_hash import CODE_SHA256
from kvjax.artifacts.files import replace_file
from kvjax.artifacts.provenance import software_versions
from kvjax.devices import device_description, lowered_folder
from kvjax.errors import InputError
from kvjax.machine import available_cores

_DIGEST_BYTES = 32  # SHA-256
# Of 0.1 to 0.4 MB; every version of the code and every shape of the data makes its own, all interventions some 20.
_KEPT_PROGRAMS = 200


@dataclasses.dataclass(frozen=True)
class LoweredFunction:
    """A function of arrays that is traced at most once, by this process or an earlier one.

    Attributes:
      jitted: what is compiled.
      arguments: makes its arguments from those of the function.
    """

    jitted: Any
    arguments: Callable[[tuple[Any, ...]], Sequence[Any]]

    def __call__(self, *args: Any) -> Any:
        """Calls it; it is compiled at its first call unless `compile_together` did so."""
        return self.jitted(*self.arguments(args))

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """Lowers it for arguments like these."""
        return self.jitted.lower(*self.arguments(args))


_calls: dict[str, LoweredFunction] = {}  # of this process: equal programs are compiled once


def kept_lowered(function: Callable[..., Any], static: Any, *args: Any) -> LoweredFunction:
    """Makes `function(static, ·)` a function of `args`, without tracing it again if an earlier process did.

    Args:
      function: jitted, of a static argument and arrays; it returns lists, tuples, dicts and arrays.
      static: its first argument; its `repr` says all of it.
      args: the arrays it will be called with, or others of the same trees, shapes, dtypes and shardings.

    Returns:
      The function. It is traced in every process if compiled programs are not cached, or if JAX cannot export one of
      its operations.
    """
    folder = lowered_folder()
    if folder is None:
        return traced_here(function, static)
    leaves, tree = jax.tree.flatten(args)
    digest = _made_from(function, static, leaves, tree)
    if digest in _calls:
        return _calls[digest]
    path = folder / f"{digest}.stablehlo"
    exported = _load(path)
    if exported is None:

        def of_leaves(*leaves: jax.Array) -> Any:
            return function(static, *jax.tree.unflatten(tree, leaves))

        try:
            exported = jax.export.export(jax.jit(of_leaves))(*leaves)
        except (ValueError, TypeError, NotImplementedError):  # JAX cannot export it
            return traced_here(function, static)
        _save(path, exported)
    _calls[digest] = LoweredFunction(jax.jit(exported.call), jax.tree.leaves)
    return _calls[digest]


def traced_here(function: Callable[..., Any], static: Any) -> LoweredFunction:
    """Makes `function(static, ·)` a function that this process traces; `function` is jitted, `static` is hashable."""
    return LoweredFunction(function, lambda args: (static, *args))


def compile_together(calls: Iterable[tuple[LoweredFunction, tuple[Any, ...]]]) -> list[LoweredFunction]:
    """Compiles functions for arguments side by side, for XLA compiles one mostly on one core; calls then find them.

    Tracing and lowering hold Python's lock, so that they stay in this thread, beside the compiling of what is lowered.
    Let `calls` trace each function when it is asked for.
    """
    functions, compiling = [], []
    with ThreadPoolExecutor(available_cores()) as threads:
        for function, args in calls:
            functions.append(function)
            compiling.append(threads.submit(function.lower(*args).compile))
    for each in compiling:
        each.result()
    return functions


def compile_beside(lowered: jax.stages.Lowered) -> Future[Any]:
    """Compiles a lowered function in a thread, while this one does something else; calls find it when that is done."""
    thread = ThreadPoolExecutor(1)
    compiling = thread.submit(lowered.compile)
    thread.shutdown(wait=False)
    return compiling


def _made_from(function: Callable[..., Any], static: Any, leaves: list[Any], tree: Any) -> str:
    """Computes a digest of everything that a lowered program depends on."""
    parts = (
        CODE_SHA256,
        software_versions(),
        device_description(),
        sorted((name, str(value)) for name, value in jax.config.values.items()),
        (function.__module__, function.__qualname__, static, tree),
        [(np.shape(leaf), leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves],
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _load(path: Path) -> jax.export.Exported | None:
    """Loads a cached program; gives None if it is missing or corrupt."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, program = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(program).digest() != digest:
        return None
    with contextlib.suppress(OSError):
        path.touch()  # used last
    return jax.export.deserialize(bytearray(program))


def _save(path: Path, exported: jax.export.Exported) -> None:
    program = bytes(exported.serialize())
    # A full disk costs the next process the tracing, and this one nothing.
    with contextlib.suppress(InputError, OSError):
        with replace_file(path, durable=False) as partial:
            partial.write_bytes(hashlib.sha256(program).digest() + program)
        by_age = sorted(path.parent.glob("*.stablehlo"), key=lambda kept: kept.stat().st_mtime, reverse=True)
        for unused in by_age[_KEPT_PROGRAMS:]:
            unused.unlink()
