"""How JAX runs here: the persistent compilation cache, and CPU cores as devices."""

from __future__ import annotations

import os
import stat
from pathlib import Path

CACHE_VARIABLE = "KVJAX_CACHE_DIR"
_DEVICES_FLAG = "--xla_force_host_platform_device_count"  # XLA's own way to say how many devices a CPU is


def cache_folder() -> Path:
    """Returns where compiled programs are kept: `KVJAX_CACHE_DIR`, or a folder of the user's cache directory."""
    given = os.environ.get(CACHE_VARIABLE)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else base / "kvjax" / "compiled"


def use_compilation_cache() -> Path | None:
    """Turns JAX's persistent compilation cache on, in a folder that nobody else can write to or read.

    Compiled programs are code: a folder that others own or can write to is not used. One that they can only read is
    closed to them.

    Returns:
      The folder; None where there is none to trust.
    """
    import jax

    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid != os.getuid() or folder.is_symlink() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return None
        if stat.S_IMODE(found.st_mode) != 0o700:
            folder.chmod(0o700)
    except OSError:
        return None
    _set_compilation_cache(str(folder))
    # Comparing states takes 0.3 s to compile, in every process if it were not kept.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return folder


def leave_compilation_cache() -> None:
    """Turns JAX's persistent compilation cache off, also where this process or its environment had turned it on.

    It stays off, whatever `start_jax` would do, until `use_compilation_cache`.
    """
    _set_compilation_cache(None)


_left = False  # whether this process was told to keep no programs


def _set_compilation_cache(folder: str | None) -> None:
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    global _left
    _left = folder is None
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # JAX remembers from its first program whether there is one


def lowered_folder() -> Path | None:
    """Returns where lowered programs are kept, inside the folder that `use_compilation_cache` trusts; None without."""
    import jax

    kept = jax.config.jax_compilation_cache_dir
    trusted = kept is not None and kept == str(cache_folder()) and jax.config.jax_enable_compilation_cache
    return Path(kept) / "lowered" if trusted else None


def available_cores() -> int:
    """Returns how many CPU cores this process may use; all there are where the system has no such limit, as macOS."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def share_cpu_cores() -> None:
    """Makes every CPU core a device, before JAX starts its backend.

    A sweep then runs one checkpoint per core. That beats running each matrix product on all cores, since attention,
    LayerNorms and activations are too small to be shared (measured in docs/performance.md). Without effect on an
    accelerator, or where the number was set before.
    """
    import jax

    if jax.config.jax_num_cpu_devices != -1 or _DEVICES_FLAG in os.environ.get("XLA_FLAGS", ""):
        return
    try:
        jax.config.update("jax_num_cpu_devices", available_cores())
    except RuntimeError:
        return  # the backend has started: whoever started it chose


def start_jax() -> None:
    """Sets JAX up for work from Python: one device per CPU core, and the compilation cache unless there is one set.

    Call it before JAX computes anything; whatever was chosen before stays. `kvjax.sweep` and `kvjax.open_run` do.
    """
    import jax

    share_cpu_cores()
    if jax.config.jax_compilation_cache_dir is None and not _left:
        use_compilation_cache()
