"""Let one command at a time write a run: a second one is refused, or waits.

The operating system holds the lock and drops it when a process ends, however it ends. Readers take no lock.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import resource
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import filelock

from kvjax.artifacts.partials import NO_LOCKS
from kvjax.errors import note, unusable

_OTHER_FILES = 512  # that a command may have open beside its locks
_NO_WRITING = {errno.EACCES, errno.EPERM, errno.EROFS}
_PATIENCE = 1.0  # seconds: a holder that is killed on a busy machine takes a moment to let go


@contextlib.contextmanager
def hold(lock_file: Path, run: Path, *, wait: bool | None = None) -> Iterator[None]:
    """Holds a lock of a run until the block ends. A thread may hold one several times.

    Args:
      lock_file: the file that stands for what is written.
      run: the run directory, for messages.
      wait: whether to wait for another command that writes there. None is for a lock that lies outside of what is
        written: nobody waits for it, and if its folder cannot be written, a note says so.

    Raises:
      InputError: another command writes there, or the folder of the lock cannot be written.
    """
    lock = filelock.FileLock(lock_file, is_singleton=True, fallback_to_soft=False, on_acquired=_describe_holder)
    with contextlib.ExitStack() as held:
        try:
            lock_file.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(_acquired(lock, lock_file, run, wait=wait))
        except OSError as error:
            if error.errno == errno.EMFILE:
                expected = "fewer runs in one command, or a higher limit of open files (ulimit -Hn)"
                raise unusable(lock_file, expected, error.strerror) from None
            if error.errno not in (NO_LOCKS if wait is not None else NO_LOCKS | _NO_WRITING):
                expected = "a folder that can be written (or `output_dir`)"
                raise unusable(lock_file.parent, expected, error.strerror) from None
            note(f"{run}: no lock can be had there ({error.strerror}); let no other command write it meanwhile")
        try:
            yield
        finally:
            if lock.lock_counter == 1:  # the next to go
                with contextlib.suppress(OSError):
                    os.truncate(lock_file, 0)  # at rest the file says nothing


@contextlib.contextmanager
def in_turn(lock_file: Path) -> Iterator[None]:
    """Waits until no other process is in such a block, for what takes a moment. Without locks it does not wait.

    Raises:
      OSError: the file cannot be written.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(filelock.FileLock(lock_file, fallback_to_soft=False).acquire())
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


def allow_locks(number: int) -> None:
    """Raises this process's limit of open files, if need be and as far as it may, to hold a number of locks at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = number + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def _acquired(
    lock: filelock.BaseFileLock, lock_file: Path, run: Path, *, wait: bool | None
) -> contextlib.AbstractContextManager:
    try:
        return lock.acquire(timeout=0 if wait else _PATIENCE)
    except filelock.Timeout:
        holder = _holder(lock_file)
    if not wait:
        choice = "" if wait is None else " (or `wait`)"
        raise unusable(run, f"no other command that writes there{choice}", holder)
    note(f"{run}: waiting for {holder}")
    return lock.acquire(timeout=-1)


def _describe_holder(descriptor: int) -> None:
    """Writes into the lock's file who holds it, for the message that a second command gets."""
    document = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "since": datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
    }
    with contextlib.suppress(OSError):  # a full disk keeps no lock from being held
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(document).encode(), 0)


def _holder(lock_file: Path) -> str:
    """Describes who holds a lock, as far as its file can be read."""
    try:
        holder = json.loads(lock_file.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}: {holder['command']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
