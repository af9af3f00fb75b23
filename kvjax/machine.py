"""What this process may use of the machine: its cores and its memory, less what control groups take away.

Containers and batch systems limit processes by control groups, which form a tree: a limit of any group on the way from
the process's own to the root holds. Version 1 has a tree per resource, version 2 one for all; a machine may have both.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path("/")
# This process's share, if it works beside others, and how many there are.
CORES_VARIABLE, MEMORY_VARIABLE, PROCESSES_VARIABLE = "KVJAX_CORES", "KVJAX_MEMORY_BYTES", "KVJAX_PROCESSES"
_MEMORY_FILES = ("memory.max", "memory.high", "memory.limit_in_bytes")  # of version 2, 2 and 1


def available_cores(root: Path = _ROOT) -> int:
    """Counts the CPU cores that this process may use; all cores if the system has no such limit, as on macOS.

    A share of a core counts as one: so many threads use all of what is allowed. A process that works beside others has
    a share of that, which `KVJAX_CORES` says.

    Args:
      root: of the file system, which the tests replace.
    """
    limits = [len(core_numbers()), *(_quota(group) for group in _groups("cpu", root))]
    with contextlib.suppress(ValueError):
        limits.append(int(os.environ.get(CORES_VARIABLE, limits[0])))
    return max(1, math.ceil(min(limits)))


def core_numbers() -> tuple[int, ...]:
    """Lists the CPU cores that this process may run on; all cores if the system has no such limit, as on macOS."""
    affinity = getattr(os, "sched_getaffinity", None)
    return tuple(sorted(affinity(0))) if affinity else tuple(range(os.cpu_count() or 1))


def machine_memory_bytes(root: Path = _ROOT) -> int:
    """Measures the memory of the machine, or the least that one of this process's control groups may have.

    A worker of a cluster has a share of that, which `KVJAX_MEMORY_BYTES` says.

    Args:
      root: of the file system, which the tests replace.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(ValueError):
        limits.append(int(os.environ.get(MEMORY_VARIABLE, limits[0])))
    for group in _groups("memory", root):
        for name in _MEMORY_FILES:
            with contextlib.suppress(OSError, ValueError):  # no such file, or `max`
                limits.append(int((group / name).read_text()))
    return min(limits)


def return_free_memory() -> None:
    """Gives the memory that malloc keeps back of what was freed to the system; does nothing without glibc.

    It keeps what lies between blocks still in use, in an arena for every thread, and more of it the longer a process
    allocates large arrays and small objects in turn.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def processes_here() -> int:
    """Counts the processes that share the work on this machine, this one included, as `KVJAX_PROCESSES` says."""
    with contextlib.suppress(ValueError):
        return max(1, int(os.environ.get(PROCESSES_VARIABLE, 1)))
    return 1


def _quota(group: Path) -> float:
    """Reads how many cores' time a group may use; infinite if it has no limit."""
    with contextlib.suppress(OSError, ValueError):  # no such file, or `max`
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota, period = ((group / name).read_text() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    return math.inf


def _groups(controller: str, root: Path) -> Sequence[Path]:
    """Lists the folders of the groups that limit this process, each from its own to the root of the tree."""
    try:
        return _mounted_groups(
            controller,
            root,
            cgroup=(root / "proc/self/cgroup").read_text(),
            mountinfo=(root / "proc/self/mountinfo").read_text(),
        )
    except (OSError, ValueError):  # a system without control groups
        return ()


@functools.lru_cache(maxsize=8)  # each config that is read asks for the memory, and there are several in a run
def _mounted_groups(controller: str, root: Path, *, cgroup: str, mountinfo: str) -> Sequence[Path]:
    own, folders = [line.split(":", 2) for line in cgroup.splitlines()], []
    for line in mountinfo.splitlines():
        with contextlib.suppress(ValueError, IndexError):  # a line of another form
            where, what = line.split(" - ", 1)
            mounted, point = (_unescaped(field) for field in where.split()[3:5])
            kind, _, options = what.split()[:3]
            for _, controllers, path in own:
                second = kind == "cgroup2" and not controllers
                first = kind == "cgroup" and controller in controllers.split(",") and controller in options.split(",")
                if first or second:
                    top = root / point.lstrip("/")
                    inside = Path(path).relative_to(mounted) if Path(path).is_relative_to(mounted) else Path()
                    folders += [top / part for part in (inside, *inside.parents)]
    return folders


def _unescaped(field: str) -> str:
    """Reads a field of `mountinfo`, which writes a space as `\\040`."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
