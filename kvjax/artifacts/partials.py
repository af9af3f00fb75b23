"""Files and folders that are being written, beside what they will replace; those of killed commands are removed.

A writer holds the system's lock on each of its partial files until it is done. The system drops the lock when a process
ends, however it ends, so that a partial file without one has no living owner. The first write of a process into a
folder removes such files there. On a file system without locks, age decides.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_SUFFIX = ".kvjax-partial"
_NEW, _OLD = ".new", ".old"  # the folder that is filled, and the one it replaces
_NAME = re.compile(r"\.(?P<target>.+)\.[a-z0-9_]{8}\.kvjax-partial")
_LOOKS, _BETWEEN = 10, 0.05  # seconds: threads of a library may write on after one failed, for 0.16 s as was seen
_DAY = 86400.0  # of a partial file that no lock can tell about: no writer takes that long over one file

# What the system answers if a file system has no locks.
NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL})

_looked_through: set[Path] = set()  # folders in which this process has removed what killed ones left
_looking = threading.Lock()  # no thread makes a partial file while another looks: some systems give a process its own


@contextlib.contextmanager
def partial_file(target: Path) -> Iterator[Path]:
    """Yields a new, empty file beside `target`, locked; removes it at the end, unless it was renamed.

    Raises:
      OSError: it cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned_once(target.parent)
    descriptor, path = _make_locked(target)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """Yields a new, empty folder beside `target`; removes it at the end, unless it was renamed.

    Raises:
      OSError: it cannot be made.
    """
    with partial_file(target) as owner:  # its lock stands for both folders
        folder = owner.with_name(owner.name + _NEW)
        folder.mkdir()
        failed = True
        try:
            yield folder
            failed = False
        finally:
            _remove_folders(owner, target)
            for _ in range(_LOOKS if failed else 0):
                time.sleep(_BETWEEN)
                shutil.rmtree(folder, ignore_errors=True)  # whoever still writes makes it anew


def put_folder_in_place(folder: Path, target: Path) -> None:
    """Renames a folder of `partial_folder` to its target, whose earlier folder goes only after it stands there.

    Raises:
      OSError: it cannot be renamed; the earlier folder is in its place again.
    """
    retired = folder.with_suffix(_OLD)
    if not target.exists():
        folder.rename(target)
        return
    target.rename(retired)
    try:
        folder.rename(target)
    except OSError:
        retired.rename(target)
        raise


def remove_abandoned(folder: Path) -> None:
    """Removes what killed commands left half-written in a folder, and puts a folder back that they had moved aside."""
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.name.endswith((_SUFFIX, _SUFFIX + _NEW))]
    except OSError:
        return
    for name in names:
        owner = name.removesuffix(_NEW)
        if owner != name:
            # A folder that is being filled has its owner beside it until it is gone.
            if _NAME.fullmatch(owner) and not (folder / owner).exists():
                shutil.rmtree(folder / name, ignore_errors=True)
        elif match := _NAME.fullmatch(name):
            # What cannot be opened or removed is someone else's, or another process is removing it.
            with contextlib.suppress(OSError):
                _remove_if_abandoned(folder / name, folder / match["target"])


def _remove_abandoned_once(folder: Path) -> None:
    folder = folder.resolve()
    with _looking:
        if folder not in _looked_through:
            remove_abandoned(folder)
            _looked_through.add(folder)


def _remove_if_abandoned(partial: Path, target: Path) -> None:
    descriptor = os.open(partial, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        locked = _lock(descriptor, wait=False)
        if locked is False or (locked is None and time.time() - os.fstat(descriptor).st_mtime < _DAY):
            return
        _remove_folders(partial, target)
        partial.unlink()
    finally:
        os.close(descriptor)


def _make_locked(target: Path) -> tuple[int, Path]:
    while True:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=_SUFFIX, dir=target.parent)
        _lock(descriptor, wait=True)
        # Another process may have found it before it was locked, and removed it.
        if os.fstat(descriptor).st_nlink:
            return descriptor, Path(name)
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool | None:
    """Takes the lock of an open file. Gives False if another holds it, and None if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None


def _remove_folders(owner: Path, target: Path) -> None:
    new, retired = (owner.with_name(owner.name + suffix) for suffix in (_NEW, _OLD))
    if retired.is_dir() and not target.exists():  # killed between the two renames
        retired.rename(target)
    for folder in (new, retired):
        shutil.rmtree(folder, ignore_errors=True)
