"""Records the software that produced a result."""

from __future__ import annotations

import functools
import importlib.metadata
import platform

_PACKAGES = ("kvjax", "jax", "jaxlib", "flax", "numpy", "scipy", "torch")


def software_versions() -> dict[str, str]:
    """Looks up the versions of Python and of the packages that a result depends on, as they were at the first call."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    """Looks them up once: that reads the files of every package, 3 ms in all, and some callers ask for every run."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return versions
