"""Runs a unit inside a worker of a cluster, and catches everything that the unit may raise.

A scheduler imports this module, so that it imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pickle
import socket
import warnings
from collections.abc import Iterator
from typing import Any

from kvjax.artifacts.code_hash import RUNNING
from kvjax.devices import leave_compilation_cache, use_compilation_cache
from kvjax.errors import InputError, Note, bad_argument, one_line, unusable
from kvjax.machine import MEMORY_VARIABLE
from kvjax.units.unit import Unit

logger = logging.getLogger("distributed.worker.kvjax")  # below Dask's, so that a worker's log shows it


@dataclasses.dataclass(frozen=True)
class Assignment:
    """A unit, and how the command that submits it runs.

    Attributes:
      unit: what to do.
      folder: the command's working directory, in which relative paths are meant.
      compilation_cache: whether compiled programs are kept.
      version: of the command's kvjax.
    """

    unit: Unit
    folder: str
    compilation_cache: bool
    version: str = RUNNING


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a unit: a result or an error, and the notes that it made."""

    result: Any = None
    error: InputError | None = None
    notes: tuple[str, ...] = ()


def run_assignment(pickled: bytes) -> Outcome:
    """Runs a pickled `Assignment` in this worker process.

    An error comes back as a value. Whatever Dask itself raises in the command is then about the cluster, not the unit.
    """
    assignment: Assignment = pickle.loads(pickled)
    unit, notes = assignment.unit, []
    try:
        with notes_into(notes), _working_in(assignment.folder):
            _check_worker(assignment)
            if assignment.compilation_cache:
                use_compilation_cache()
            else:
                leave_compilation_cache()
            return Outcome(unit.function(*unit.arguments, **unit.keywords), notes=tuple(notes))
    except InputError as error:
        return Outcome(error=error, notes=tuple(notes))
    except Exception as error:
        logger.exception("%s: %s failed", unit.subject, unit.name)
        found = f"{type(error).__name__}: {one_line(error)} (on {_here()}, whose log has the traceback)"
        return Outcome(error=unusable(unit.subject, f"its {unit.name} to end", found), notes=tuple(notes))


def _check_worker(assignment: Assignment) -> None:
    """Refuses a worker that would run two units at once, or another version; limits memory to the worker's share."""
    from distributed import get_worker

    worker = get_worker()
    if worker.state.nthreads != 1:
        expected = "workers of one thread, such as those of `dask worker --nthreads=1`"
        raise bad_argument("scheduler", expected, f"{worker.state.nthreads} threads on {_here()}")
    if assignment.version != RUNNING:
        raise bad_argument("scheduler", f"workers with kvjax {assignment.version}", f"{RUNNING} on {_here()}")
    if limit := worker.memory_manager.memory_limit:
        os.environ[MEMORY_VARIABLE] = str(limit)


@contextlib.contextmanager
def _working_in(folder: str) -> Iterator[None]:
    """Works in the command's folder, so that the relative paths of a unit, its messages and its files are the same."""
    before = os.getcwd()
    try:
        os.chdir(folder)
    except OSError as error:
        expected = f"a folder that every worker sees, for the command runs in {folder}"
        raise bad_argument("scheduler", expected, f"{error.strerror} on {_here()}") from None
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def notes_into(notes: list[str]) -> Iterator[None]:
    """Collects notes, for the command to print; other warnings stay in the worker's log."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", Note)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, Note):
                notes.append(str(message))
            else:
                others(message, category, *where, **more)

        warnings.showwarning = show
        yield


def _here() -> str:
    return f"process {os.getpid()} of {socket.gethostname()}"
