"""What a command does around its work: set JAX up, show progress, choose where units of work run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from kvjax.pipeline.settings import Display, Runtime, WorkplaceSettings
from kvjax.units.unit import IN_PROCESS, Engine

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
