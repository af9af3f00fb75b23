"""Divides machines among the processes of a group: cores, memory and GPUs, as each process sees them."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any, Self

from kvjax.devices import gpu_uuids
from kvjax.errors import bad_argument
from kvjax.machine import (
    CORES_VARIABLE,
    MEMORY_VARIABLE,
    PROCESSES_VARIABLE,
    available_cores,
    core_numbers,
    machine_memory_bytes,
)

_VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
_CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
_XLA_THREADS = ("PJRT_NPROC", "NPROC")


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What one process may use, as if it were alone there.

    Attributes:
      host: name of the machine.
      cores: numbers of the CPU cores that it may run on.
      core_limit: how many of them at once, less than all if a control group has a quota.
      memory_bytes: of the machine, or the least of the control groups' limits.
      gpus: names of the GPUs that JAX would take, as they count in this process alone.
      driver_gpus: identities of all GPUs that the driver shows to it: others than to another process of the machine if
        a launcher keeps each to cards of its own.
    """

    host: str
    cores: tuple[int, ...]
    core_limit: int
    memory_bytes: int
    gpus: tuple[str, ...]
    driver_gpus: tuple[str, ...]

    @classmethod
    def here(cls) -> Self:
        """Describes those of this process."""
        return cls(socket.gethostname(), core_numbers(), available_cores(), machine_memory_bytes(), *_gpus())

    @classmethod
    def of_json(cls, document: Mapping[str, Any]) -> Self:
        """Reads a JSON document of the fields."""
        tuples = {name: tuple(document[name]) for name in ("cores", "gpus", "driver_gpus")}
        return cls(**{**document, **tuples})


@dataclasses.dataclass(frozen=True)
class Place:
    """What one process takes of what it shares with others of its group.

    Attributes:
      cores: how many CPU cores.
      memory_bytes: how much memory.
      processes: how many share the machine.
      gpus: which GPUs; None for all that JAX finds.
    """

    cores: int
    memory_bytes: int
    processes: int
    gpus: tuple[str, ...] | None

    @classmethod
    def of_json(cls, document: Mapping[str, Any]) -> Self:
        """Reads a JSON document of the fields."""
        gpus = document["gpus"]
        return cls(document["cores"], document["memory_bytes"], document["processes"], gpus and tuple(gpus))

    def take(self) -> None:
        """Takes the place, before JAX starts its backend: by environment, which JAX, XLA and kvjax read."""
        os.environ[CORES_VARIABLE], os.environ[MEMORY_VARIABLE] = str(self.cores), str(self.memory_bytes)
        os.environ[PROCESSES_VARIABLE] = str(self.processes)
        if not set(_XLA_THREADS) & os.environ.keys():
            os.environ[_XLA_THREADS[0]] = str(self.cores)
        if self.gpus is not None:
            os.environ[_VISIBLE_GPUS] = ",".join(self.gpus)


def divide(members: Sequence[Surroundings]) -> list[Place]:
    """Divides each machine among the processes on it.

    Processes that a launcher has bound to cores or GPUs of their own keep these.

    Args:
      members: the surroundings of each process of a group.

    Raises:
      InputError: more processes share GPUs than there are.
    """
    places = []
    for index, own in enumerate(members):
        mates = [other for other in members if other.host == own.host]
        earlier = sum(other.host == own.host for other in members[:index])
        share = sum(1 / sum(core in other.cores for other in mates) for core in own.cores)
        if own.core_limit < len(own.cores):
            share = min(share, own.core_limit / len(mates))
        # Cores that do not divide go to the last processes.
        cores = int((earlier + 1) * share + 1e-9) - int(earlier * share + 1e-9)
        memory = own.memory_bytes // len(mates)
        places.append(Place(max(1, cores), memory, len(mates), _own_gpus(index, members)))
    return places


def _own_gpus(index: int, members: Sequence[Surroundings]) -> tuple[str, ...] | None:
    def seen(one: Surroundings) -> tuple[Any, ...]:
        return one.host, one.driver_gpus, one.gpus

    own = members[index]
    sharing = [place for place, other in enumerate(members) if seen(other) == seen(own)]
    if not own.gpus or len(sharing) == 1:
        return None
    if len(sharing) > len(own.gpus):
        found = f"{len(sharing)} for {len(own.gpus)}"
        raise bad_argument("processes", f"at most one for each GPU of {own.host}", found)
    return own.gpus[sharing.index(index) :: len(sharing)]


def _gpus() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names the GPUs that JAX would take, and lists the identities of all that the driver shows; none on a CPU."""
    if os.environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu"):
        return (), ()
    if not any(importlib.util.find_spec(plugin) for plugin in _CUDA_PLUGINS):
        return (), ()
    uuids = tuple(gpu_uuids())
    return _visible(os.environ.get(_VISIBLE_GPUS), len(uuids)), uuids


def _visible(named: str | None, count: int) -> tuple[str, ...]:
    """Names those of so many GPUs that `CUDA_VISIBLE_DEVICES` shows: all without it, none if it is empty.

    A name that is none hides its GPU and all that follow, as CUDA reads it; people write `-1` for that, and Slurm
    `NoDevFiles`.
    """
    if named is None:
        return tuple(map(str, range(count)))
    names = [name.strip() for name in named.split(",")]
    return tuple(itertools.takewhile(_may_name, names))


def _may_name(name: str) -> bool:
    return name.isdecimal() or name.upper().startswith(("GPU-", "MIG-"))
