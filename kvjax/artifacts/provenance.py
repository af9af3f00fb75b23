"""Records the software that produced a result."""

from __future__ import annotations

import importlib.metadata
import platform

_PACKAGES = ("kvjax", "jax", "jaxlib", "flax", "numpy", "scipy", "torch")


def software_versions() -> dict[str, str]:
    """Looks up the versions of Python and of the packages that a result depends on."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return versions
