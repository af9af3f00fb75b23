"""The devices that JAX has, how work is placed on them, and the compilation cache.

No other module asks JAX for its devices. JAX is imported when it is first needed, since commands read this module.
"""

from __future__ import annotations

import dataclasses
import math
import os
import stat
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvjax.errors import unusable
from kvjax.machine import available_cores, machine_memory_bytes, processes_here
from kvjax.right_sums import check_sums

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh, NamedSharding

# How several of a kind are run on one device: one after another in a loop, or side by side.
Lift = Literal["map", "vmap"]

DEVICE_AXIS = "device"  # the one axis of every mesh

CACHE_VARIABLE = "KVJAX_CACHE_DIR"
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_DEVICES_FLAG = "--xla_force_host_platform_device_count"  # XLA's own way to say how many devices a CPU is

_DEBUGGING = ("jax_debug_nans", "jax_debug_infs", "jax_disable_jit")
_DEFAULT_ACCELERATOR_BYTES = 8e9  # if the device does not say how much it has
_ACCELERATOR_SHARE = 0.7
_MACHINE_SHARE = 0.5

# The share of a GPU's memory that JAX takes at its start, by its names of today and before, and whether it does.
_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
_SECONDS_FOR_DRIVER = 20


@dataclasses.dataclass(frozen=True)
class Placement:
    """Which devices share the leading axis of arrays (checkpoints, seeds), and how each runs its part.

    Attributes:
      devices: how many devices, the first ones of this process.
      lift: how a device runs its part.
    """

    devices: int = 1
    lift: Lift = "map"

    @property
    def mesh(self) -> Mesh:
        """The devices along `DEVICE_AXIS`."""
        import jax
        import numpy as np

        return jax.sharding.Mesh(np.array(jax.local_devices()[: self.devices]), (DEVICE_AXIS,))

    @property
    def split(self) -> NamedSharding:
        """Where arrays lie whose leading axis the devices share, in equal parts."""
        import jax

        return jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec(DEVICE_AXIS))

    @property
    def whole(self) -> NamedSharding:
        """Where arrays lie that every device has all of."""
        import jax

        return jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())

    def on_each_device(self, function: Callable[..., Any], split: Sequence[bool]) -> Callable[..., Any]:
        """Turns a function of one device's part into a function of arrays that all devices share.

        Args:
          function: of parts, to arrays that are parts of the results.
          split: for each argument, whether the devices share its leading axis; each has all of the others.
        """
        import jax

        if self.devices == 1:
            return function
        shared, everything = jax.sharding.PartitionSpec(DEVICE_AXIS), jax.sharding.PartitionSpec()
        specs = tuple(shared if of_argument else everything for of_argument in split)
        return jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=shared, check_vma=False)

    def parts(self, x: jax.Array) -> list[jax.Array]:
        """Lists each device's part of a shared array, in order, without moving any."""
        return [shard.data for shard in sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)]

    def joined(self, parts: Sequence[jax.Array]) -> jax.Array:
        """Moves equal parts to the devices in order, and joins them into one shared array."""
        import jax

        devices = self.mesh.devices.tolist()
        moved = [jax.device_put(part, device) for part, device in zip(parts, devices, strict=True)]
        shape = (sum(map(len, moved)), *moved[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, self.split, moved)


ONE_DEVICE = Placement()


def backend() -> str:
    """Names the backend that JAX computes on: `cpu`, `gpu` or `tpu`.

    Everything that computes asks for it first.

    Raises:
      InputError: it is a CPU on which known sums come out wrong.
    """
    import jax

    name = jax.default_backend()
    if name == "cpu":
        check_sums()
    return name


def device_count() -> int:
    """Counts the devices of this process."""
    import jax

    return jax.local_device_count()


def device_description() -> dict[str, Any]:
    """Describes the devices: backend, kind and count."""
    import jax

    devices = jax.devices()
    return {"backend": jax.default_backend(), "kind": devices[0].device_kind, "count": len(devices)}


def fillable_memory_gb(given_gb: float | None = None) -> float:
    """Measures the memory that a computation may fill: of each accelerator, or of the machine on a CPU.

    On an accelerator that is most of the memory JAX may allocate. On a CPU it is half of the memory of the machine or
    its container, because the process itself and compiling take about 2 GB.

    Args:
      given_gb: a bound that a person gave: on an accelerator on what JAX allocates, on a CPU on what is filled by all
        processes that share the machine.
    """
    if backend() == "cpu":
        given_here = None if given_gb is None else given_gb / processes_here()
        return given_here or machine_memory_bytes() * _MACHINE_SHARE / 1e9
    limit = _accelerator_limit()
    if given_gb is not None:
        return min(given_gb, limit / 1e9 if limit else math.inf) * _ACCELERATOR_SHARE
    return (limit * _ACCELERATOR_SHARE if limit else _DEFAULT_ACCELERATOR_BYTES) / 1e9


def available_memory_bytes() -> float:
    """Measures the memory that there is: of each accelerator, infinite if it does not say, or of the machine."""
    return machine_memory_bytes() if backend() == "cpu" else _accelerator_limit() or math.inf


def _accelerator_limit() -> int | None:
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def cache_folder() -> Path:
    """Names the folder of compiled programs: `KVJAX_CACHE_DIR`, or a folder in the user's cache directory.

    Raises:
      RuntimeError: no variable names one, and the user has no home.
    """
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvjax" / "compiled"


def use_compilation_cache() -> Path | None:
    """Turns JAX's persistent compilation cache on, in a folder that is private to the user.

    Compiled programs are code, so a folder that others own or may write to is not used.

    Returns:
      The folder; None if there is none to trust.
    """
    import jax

    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & _WRITABLE_BY_OTHERS:
            return None
        folder.chmod(0o700)
    except (OSError, RuntimeError):
        return None
    _set_compilation_cache(str(folder))
    # Comparing states takes 0.3 s to compile; by default, JAX keeps only programs that take a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return folder


def leave_compilation_cache() -> None:
    """Turns JAX's persistent compilation cache off, even if this process or its environment turned it on.

    It stays off until `use_compilation_cache`; `start_jax` does not turn it on again.
    """
    _set_compilation_cache(None)


_left = False  # whether `leave_compilation_cache` turned the cache off


def _set_compilation_cache(folder: str | None) -> None:
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    global _left
    _left = folder is None
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # JAX looks for a cache only at its first program


def lowered_folder() -> Path | None:
    """Names the folder of lowered programs, inside the one of `use_compilation_cache`; None without that cache."""
    import jax

    kept = jax.config.jax_compilation_cache_dir
    try:
        trusted = kept is not None and kept == str(cache_folder()) and jax.config.jax_enable_compilation_cache
    except RuntimeError:
        return None
    return Path(kept) / "lowered" if trusted else None


def bound_accelerator_memory(gb: float) -> None:
    """Keeps JAX from taking more memory of an accelerator, before it starts its backend.

    JAX takes three quarters of a GPU's memory when it starts, which another process may need, and then gets no more.
    A share that the environment names already stays. If the size of the GPUs is not known, JAX takes memory as it needs
    it instead, and gives none back.

    Args:
      gb: gigabytes that JAX may take.
    """
    if any(name in os.environ for name in _FRACTIONS):
        return
    sizes = gpu_bytes()
    if sizes:
        os.environ[_FRACTIONS[0]] = f"{min(gb * 1e9 / min(sizes), 1.0):.4f}"
    else:
        os.environ.setdefault(_PREALLOCATE, "false")


def gpu_bytes() -> list[int]:
    """Asks NVIDIA's driver for the memory of each GPU; nothing if there is none."""
    try:
        return [int(line) << 20 for line in _ask_driver("memory.total")]
    except ValueError:
        return []


def gpu_uuids() -> list[str]:
    """Asks NVIDIA's driver for the identity of each GPU that this process may see; nothing if there is none."""
    return _ask_driver("uuid")


def _ask_driver(field: str) -> list[str]:
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_SECONDS_FOR_DRIVER, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.split("\n") if line.strip()]


def share_cpu_cores() -> None:
    """Makes every CPU core a device, before JAX starts its backend.

    A sweep then runs one checkpoint per core. That beats running each matrix product on all cores, since attention,
    LayerNorms and activations are too small to be shared (measured in docs/performance.md). It has no effect
    on an accelerator, or if the number was set before.
    """
    import jax

    if jax.config.jax_num_cpu_devices != -1 or _DEVICES_FLAG in os.environ.get("XLA_FLAGS", ""):
        return
    cores = available_cores()
    try:
        jax.config.update("jax_num_cpu_devices", cores)
    except RuntimeError:
        return  # the backend has started: whoever started it chose
    if not {"PJRT_NPROC", "NPROC"} & os.environ.keys():
        os.environ["PJRT_NPROC"] = str(cores)  # XLA counts cores for its threads, but knows no quota


def start_jax() -> None:
    """Sets JAX up for work from Python: one device per CPU core, and the compilation cache unless there is one set.

    Call it before JAX computes anything; whatever was chosen before stays. `kvjax.sweep` and `kvjax.open_run` do.

    Raises:
      InputError: JAX is to stop at NaN, which stands for values that do not exist here, or not to compile; or it
        started before kvjax was imported, and gives wrong sums.
    """
    import jax

    for name in _DEBUGGING:
        if getattr(jax.config, name):
            raise unusable(f"jax.config.{name}", "False (as unless JAX is debugged)", True)
    share_cpu_cores()
    if jax.config.jax_compilation_cache_dir is None and not _left:
        use_compilation_cache()
    backend()
