"""Local clusters: a scheduler in this process, and worker processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dask
from distributed import LocalCluster

# The environment of a command beside a cluster: a worker has one device, and finds the tests' units.
ONE_DEVICE = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


@contextlib.contextmanager
def local_cluster(
    *, workers: int = 1, threads: int = 1, memory: str = "4GB", deaths: int = 1
) -> Iterator[LocalCluster]:
    """Runs a scheduler and worker processes; a unit with which more workers die than `deaths` is given up."""
    with dask.config.set({"distributed.scheduler.allowed-failures": deaths}):
        opened = LocalCluster(
            n_workers=workers, threads_per_worker=threads, memory_limit=memory, dashboard_address=None, silence_logs=50
        )
    with opened:
        yield opened


def run_without_dask(*arguments: str) -> str:
    """Runs a command in a process of its own that cannot import Dask, and returns what it prints.

    No test has changed there how a sweep is compiled, so that it computes what a worker computes.
    """
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('dask', 'distributed', 'dask_jobqueue')));"
        "from kvjax.commands.main import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=ONE_DEVICE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
