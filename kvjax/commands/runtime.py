"""What a command does around its work: set JAX up, show progress, choose where units of work run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from kvjax.errors import bad_argument
from kvjax.pipeline.settings import Display, ProcessSettings, Runtime, WorkplaceSettings
from kvjax.units.unit import IN_PROCESS, Engine

if TYPE_CHECKING:
    from kvjax.units.follower import Follower
    from kvjax.units.leader import Leader

DEFAULT_RUNTIME = Runtime()


def start_jax(runtime: Runtime, *, memory_gb: float | None = None) -> None:
    """Sets JAX up before anything computes: the compilation cache, and one device per CPU core.

    Args:
      runtime: what a person chose.
      memory_gb: memory of each accelerator that JAX may take; None for its own choice.
    """
    from kvjax.devices import (
        bound_accelerator_memory,
        leave_compilation_cache,
        share_cpu_cores,
        use_compilation_cache,
    )

    if runtime.compilation_cache:
        use_compilation_cache()
    else:
        leave_compilation_cache()
    if memory_gb is not None:
        bound_accelerator_memory(memory_gb)
    share_cpu_cores()


def progress_of(display: Display) -> Callable[[int, str], AbstractContextManager[Callable[[int], None]]]:
    """Makes progress bars on standard error, with the time left; hidden ones if none are to be shown."""

    @contextmanager
    def progress(total: int, unit: str) -> Iterator[Callable[[int], None]]:
        from tqdm import tqdm

        with tqdm(total=total, unit=f" {unit}", disable=not display.progress, dynamic_ncols=True) as bar:
            yield bar.update

    return progress


def engine_of(workplace: WorkplaceSettings, runtime: Runtime = DEFAULT_RUNTIME) -> Engine:
    """Chooses what runs units of work: this process, or the workers of a scheduler.

    Raises:
      InputError: the scheduler's name is none, or Dask is not installed.
    """
    if workplace.scheduler is None:
        return IN_PROCESS
    from kvjax.units.cluster import Cluster

    return Cluster(workplace.scheduler, compilation_cache=runtime.compilation_cache)


def group_of(
    settings: ProcessSettings, workplace: WorkplaceSettings, command: list[str]
) -> AbstractContextManager[Leader | Follower | None]:
    """Starts or joins the processes that share a command's work, before JAX starts: a machine is divided among them.

    Args:
      settings: how many there are.
      workplace: where units of work run otherwise.
      command: the command's name and flags, without `processes`, for processes that are started here.

    Returns:
      A context that gives this process's part: it leads or follows, or it is None, alone.

    Raises:
      InputError: processes are asked for beside a scheduler, or do not find each other.
    """
    if settings.processes == "1":
        return nullcontext()
    if workplace.scheduler is not None:
        raise bad_argument("processes", "no `scheduler` beside it, whose workers share checkpoints", settings.processes)
    from kvjax.units.group import joined, started
    from kvjax.units.membership import detect_membership

    if settings.processes == "auto":
        return joined(detect_membership())
    # -P: what lies in the working directory is not imported instead of what this process runs.
    same = [sys.executable, "-P", "-m", __package__ + ".main", *command, "--processes=auto"]
    return started(int(settings.processes), same)
