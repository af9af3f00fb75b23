"""Local clusters: a scheduler and workers, each a process of its own, as people start them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from kvjax.units.cluster import Cluster
from tests.helpers.commands import optimised_environment

# What a command beside a cluster has in its environment: a worker has one device, and finds the tests' units.
_ONE_DEVICE = {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
ONE_DEVICE = os.environ | _ONE_DEVICE
_SILENT = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}


class LocalCluster:
    """A scheduler, and as many workers as it is scaled to.

    Attributes:
      file: the file that the scheduler wrote.
      scheduler: its process.
    """

    def __init__(self, folder: Path, *, threads: int, memory: str, deaths: int, optimised: bool):
        self.file, self._threads, self._memory, self._folder = folder / "scheduler.json", threads, memory, folder
        self._environment = _environment(optimised)
        environment = self._environment | {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": str(deaths)}
        self.scheduler = self._start("scheduler", "--port=0", f"--scheduler-file={self.file}", env=environment)
        self._workers: list[subprocess.Popen] = []
        while not self.file.is_file() or not self.file.read_text():
            time.sleep(0.05)

    def _start(self, *arguments: str, env: dict[str, str]) -> subprocess.Popen:
        command = [sys.executable, "-m", "dask", *arguments, "--no-dashboard"]
        return subprocess.Popen(command, cwd=self._folder, env=env, **_SILENT)

    def scale(self, number: int) -> Cluster:
        """Starts or kills workers until there are so many, and returns an engine on them."""
        of_each = [f"--nthreads={self._threads}", f"--memory-limit={self._memory}", f"--scheduler-file={self.file}"]
        while len(self._workers) < number:
            self._workers.append(self._start("worker", *of_each, env=self._environment))
        while len(self._workers) > number:
            kill(self._workers.pop())
        engine = Cluster(str(self.file))
        while engine.workers() != number:
            time.sleep(0.1)
        return engine

    def close(self) -> None:
        """Kills the scheduler and the workers."""
        for process in (*self._workers, self.scheduler):
            kill(process)


def kill(process: subprocess.Popen) -> None:
    """Kills a process with those that it started, and waits for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def local_cluster(
    *, workers: int = 1, threads: int = 1, memory: str = "4GB", deaths: int = 1, optimised: bool = False
) -> Iterator[LocalCluster]:
    """Runs a scheduler and workers; a unit with which more workers die than `deaths` is given up.

    Workers compile quickly, or `optimised`, as they do for people: only then a training run has the same bits alone and
    beside others.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        opened = LocalCluster(Path(folder), threads=threads, memory=memory, deaths=deaths, optimised=optimised)
        try:
            opened.scale(workers)
            yield opened
        finally:
            opened.close()


def _environment(optimised: bool) -> dict[str, str]:
    return (optimised_environment() if optimised else os.environ) | _ONE_DEVICE


def run_without_dask(*arguments: str, optimised: bool = False) -> str:
    """Runs a command in a process of its own that cannot import Dask, and returns what it prints.

    No test has changed there how a sweep is compiled, so that it computes what a worker computes.
    """
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('dask', 'distributed', 'dask_jobqueue')));"
        "from kvjax.commands.main import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=_environment(optimised), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
