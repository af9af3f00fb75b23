"""Runs a command in a forked process that counts its operations on files, and kills it at a moment.

Forked, since the parent has imported everything once: a command then starts in a tenth of a second. Nothing in the
parent may start a thread, as JAX does.
"""

from __future__ import annotations

import dataclasses
import importlib
import mmap
import os
import pickle
import signal
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}
_PATIENCE = 3600.0  # seconds for a command that nobody kills: on a busy machine


@dataclasses.dataclass(frozen=True)
class Moment:
    """When a command is killed: just before an operation on files of a number, or after some work.

    Attributes:
      operation: the number, from 1; None for a time.
      seconds: of the processors' time that it has used, for that depends little on what else the machine does; None for
        an operation.
    """

    operation: int | None = None
    seconds: float | None = None


NEVER = Moment()


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One run of a command.

    Attributes:
      status: its exit status, negative if it was killed.
      operations: on files that it had begun.
      seconds: of the processors' time that it used.
    """

    status: int
    operations: int
    seconds: float

    @property
    def killed(self) -> bool:
        """Checks whether the kill came before the command ended."""
        return self.status == -signal.SIGKILL


class Counter:
    """Counts a child's operations on files below a folder, in memory that parent and child share.

    Files opened to be written, renamed, removed and truncated, and folders made and removed count. What libraries in
    other languages do, such as netCDF's, is not seen: kills after some seconds come there.
    """

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 8)

    @property
    def operations(self) -> int:
        return struct.unpack("q", self._shared[:8])[0]

    @operations.setter
    def operations(self, number: int) -> None:
        self._shared[:8] = struct.pack("q", number)

    def watch(self, root: Path, kill_at: int | None) -> None:
        """Counts from now on in this process, and kills it before the operation of a number."""
        below = str(root)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in _CHANGES:
                pass
            elif event != "open" or not (arguments[2] or 0) & _WRITING:
                return
            if isinstance(arguments[0], str | os.PathLike) and str(arguments[0]).startswith(below):
                self.operations += 1
                if self.operations == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


def run_command(arguments: Sequence[str], folder: Path, counter: Counter, moment: Moment = NEVER) -> Attempt:
    """Runs a command in a forked process and kills it at a moment, if it has not ended by then.

    Args:
      arguments: of the command.
      folder: that it works in; what it prints goes into `log` beside it.
      counter: of its operations.
      moment: of the kill.
    """
    counter.operations, used, begun = 0, 0.0, time.monotonic()

    def work() -> int:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        counter.watch(folder, moment.operation)
        from kvjax.commands.main import main

        return main(list(arguments))

    child = _forked(work)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            used = time.clock_gettime(_processor_clock(child))
            if time.monotonic() > begun + _PATIENCE or (moment.seconds is not None and used >= moment.seconds):
                os.kill(child, signal.SIGKILL)
                ended, status = os.waitpid(child, 0)
        if ended:
            return Attempt(os.waitstatus_to_exitcode(status), counter.operations, used)
        time.sleep(0.002)


def _processor_clock(process: int) -> int:
    """Names the clock of a process's own use of processors, as Linux's `clock_getcpuclockid` forms it."""
    return ~process << 3 | 2


def in_child(function: Callable[[], Any], file: Path) -> Any:
    """Calls a function in a forked process, for libraries that read numbers start threads; returns what it gives.

    Raises:
      RuntimeError: it raised an error, which stands on standard error.
    """

    def work() -> int:
        file.write_bytes(pickle.dumps(function()))
        return 0

    _, status = os.waitpid(_forked(work), 0)
    if status:
        raise RuntimeError(f"{file.stem}: its numbers cannot be read")
    return pickle.loads(file.read_bytes())  # our own child wrote it


def _forked(work: Callable[[], int]) -> int:
    """Starts a process that does some work and exits with its status; returns its number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        status = work()
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stderr.flush()
        os._exit(status)


def preload() -> None:
    """Imports what commands need, so that a forked process starts at once; none of it starts a thread of its own."""
    for name in ("sweep", "train", "convert", "interventions", "pipeline", "factor_screen", "text"):
        importlib.import_module(f"kvjax.pipeline.{name}")
    for name in ("kvjax.sweeps.tables", "kvjax.report.text", "kvjax.converters.convert", "orbax.checkpoint", "tqdm"):
        importlib.import_module(name)
