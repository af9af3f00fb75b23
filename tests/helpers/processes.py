"""Processes that share a sweep, each started as a launcher does it, on the loopback."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.clusters import ONE_DEVICE

_SLURM_PORTS = 61440  # the first of those that JAX makes of a job's number
# Writes the names of the checkpoint files that a process opens into a file of its own.
_RECORD_OPENED = """
    import os, sys
    folder = os.environ["OPENED_FILES"]
    def hook(event, args):
        if event == "open" and str(args[0]).endswith(".pt"):
            with open(os.path.join(folder, f"{os.getpid()}.txt"), "a") as file:
                file.write(os.path.basename(str(args[0])) + "\\n")
    sys.addaudithook(hook)
"""


def sweep_command(run: Path, *flags: str) -> list[str]:
    """Returns a quick sweep of a run, as a command of its own."""
    quick = ["--ablations=zero", "--probe=none", "--noprogress"]
    return [sys.executable, "-m", "kvjax.commands.main", "checkpoint-sweep", f"--run_dirs={run}", *quick, *flags]


def free_port() -> int:
    """Finds a free port among those that JAX derives from the number of a Slurm job."""
    for port in range(_SLURM_PORTS + os.getpid() % 4000, 65535):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no free port")


def launched_by_slurm(count: int, port: int) -> list[dict[str, str]]:
    """Returns the environment variables that `srun` would set for each task, all on this machine."""
    job = {"SLURM_JOB_ID": str(port - _SLURM_PORTS), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count)}
    return [job | {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)} for index in range(count)]


def launched_by_hand(count: int, port: int) -> list[dict[str, str]]:
    """Returns the environment of each process where no launcher is detected."""
    group = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    return [group | {"JAX_PROCESS_ID": str(index)} for index in range(count)]


@contextlib.contextmanager
def group_of_processes(command: list[str], environments: list[dict[str, str]]) -> Iterator[list[subprocess.Popen]]:
    """Starts the processes of a group; whatever still runs at the end is killed."""
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, "--processes=auto"], env=ONE_DEVICE | own, **piped) for own in environments]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                stream.close()


def recording_opened_files(folder: Path) -> dict[str, str]:
    """Returns an environment in which each process writes what it opens into a file of this folder."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(textwrap.dedent(_RECORD_OPENED))
    paths = os.pathsep.join([str(folder), ONE_DEVICE["PYTHONPATH"]])
    return ONE_DEVICE | {"PYTHONPATH": paths, "OPENED_FILES": str(folder)}
