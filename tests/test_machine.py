"""Cores and memory under control groups, in file systems laid out as Docker, Kubernetes, Slurm and systemd do."""

import os
import platform
import subprocess
import sys

import pytest

from kvjax.machine import available_cores, machine_memory_bytes

CORES, MEMORY = len(os.sched_getaffinity(0)), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
GB = 1_000_000_000

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Writes a file system with the control groups of a machine with 16 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)

    def write(mounts, own, **files):
        for name, text in {"proc/self/mountinfo": mounts, "proc/self/cgroup": own, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def test_machine_without_groups(machine, tmp_path, monkeypatch):
    """Without control groups everything counts, also where the system has no affinity masks."""
    assert (available_cores(tmp_path), machine_memory_bytes(tmp_path)) == (16, MEMORY) and MEMORY > GB
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cores(tmp_path) == os.cpu_count()


@pytest.mark.parametrize(
    ("limits", "cores"),
    [
        ({}, 16),
        ({"job/task/cpu.max": "max 100000"}, 16),
        ({"job/task/cpu.max": "400000 100000"}, 4),
        ({"job/task/cpu.max": "150000 100000"}, 2),
        ({"job/task/cpu.max": "1000 100000"}, 1),
        ({"job/task/cpu.max": "max 100000", "job/cpu.max": "25000 50000"}, 1),
        ({"job/task/cpu.max": "400000 100000", "job/cpu.max": "300000 100000", "cpu.max": "900000 100000"}, 3),
        ({"cpu.max": "200000 100000", "elsewhere/cpu.max": "100000 100000"}, 2),
        ({"job/task/cpu.max": "9900000 100000"}, 16),
        ({"job/task/cpu.max": "nonsense"}, 16),
    ],
)
def test_quota(machine, limits, cores):
    """The least quota on the way to the root counts, in version 2; a started core is one."""
    files = {f"sys/fs/cgroup/{name}": text + "\n" for name, text in limits.items()}
    assert available_cores(machine(V2, "0::/job/task\n", **files)) == cores


@pytest.mark.parametrize(
    ("limits", "memory"),
    [
        ({"job/task/memory.max": "max"}, MEMORY),
        ({"job/task/memory.max": str(2 * GB), "job/memory.max": "max"}, 2 * GB),
        ({"job/task/memory.max": "max", "job/memory.max": str(GB)}, GB),
        ({"job/task/memory.max": str(2 * GB), "job/memory.high": str(GB)}, GB),
        ({"elsewhere/memory.max": "1000"}, MEMORY),
    ],
)
def test_memory(machine, limits, memory):
    """The least limit on the way to the root counts, in version 2."""
    files = {f"sys/fs/cgroup/{name}": text + "\n" for name, text in limits.items()}
    assert machine_memory_bytes(machine(V2, "0::/job/task\n", **files)) == memory


def test_version_1(machine):
    """Each resource has its own tree there; no limit is -1, or a number beyond the machine's memory."""
    own = "5:memory:/slurm/job_7\n4:cpu,cpuacct:/slurm/job_7/step_0\n2:cpuset:/elsewhere\n0::/\n"
    cpu, memory = "sys/fs/cgroup/cpu,cpuacct/slurm", "sys/fs/cgroup/memory/slurm"
    root = machine(
        V1,
        own,
        **{
            f"{cpu}/job_7/step_0/cpu.cfs_quota_us": "-1\n",
            f"{cpu}/job_7/step_0/cpu.cfs_period_us": "100000\n",
            f"{cpu}/job_7/cpu.cfs_quota_us": "600000\n",
            f"{cpu}/job_7/cpu.cfs_period_us": "100000\n",
            f"{memory}/job_7/memory.limit_in_bytes": "9223372036854771712\n",
            f"{memory}/memory.limit_in_bytes": f"{3 * GB}\n",
        },
    )
    assert (available_cores(root), machine_memory_bytes(root)) == (6, 3 * GB)


def test_mount_of_a_part(machine):
    """A container that sees the tree from its own group on finds its limit at the mount's root, not below it."""
    mounts = "30 23 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n"
    root = machine(mounts, "0::/docker/abc\n", **{"sys/fs/cgroup/cpu.max": "200000 100000\n"})
    assert available_cores(root) == 2
    root = machine(mounts, "0::/docker/abc/inner\n", **{"sys/fs/cgroup/inner/cpu.max": "100000 100000\n"})
    assert available_cores(root) == 1
    (root / "sys/fs/cgroup/inner/cpu.max").unlink()
    assert available_cores(machine(mounts, "0::/../other\n")) == 2


def test_mount_point_with_a_space(machine):
    """The kernel writes a space as an octal number."""
    root = machine(V2.replace("/sys/fs/cgroup", "/my\\040groups"), "0::/\n", **{"my groups/memory.max": f"{GB}\n"})
    assert machine_memory_bytes(root) == GB


@pytest.mark.parametrize("text", ["", "nonsense\n", "0::/job\n" + "x" * 100, "\0"])
def test_damaged_files(machine, text):
    """What cannot be parsed limits nothing."""
    root = machine(text, text)
    assert (available_cores(root), machine_memory_bytes(root)) == (16, MEMORY)


def test_share_of_a_worker(monkeypatch, tmp_path):
    """A worker's share limits memory; a text that is no number limits nothing."""
    whole = machine_memory_bytes(tmp_path)
    monkeypatch.setenv("KVJAX_MEMORY_BYTES", "123456789")
    assert machine_memory_bytes(tmp_path) == 123456789
    monkeypatch.setenv("KVJAX_MEMORY_BYTES", "some")
    assert machine_memory_bytes(tmp_path) == whole


# Memory that is freed below a block in use, which malloc keeps back; in a process of its own, for it counts the whole.
KEPT_BACK = """
import resource
from kvjax.machine import return_free_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

blocks = [b"x" * 60_000 for _ in range(2_000)]  # too small to be mapped from the system one by one
del blocks[:-1]
before = resident()
return_free_memory()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries do not keep memory back so")
def test_return_free_memory():
    """Nearly all of 120 MB that were freed go back to the system."""
    done = subprocess.run([sys.executable, "-c", KEPT_BACK], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100_000_000
