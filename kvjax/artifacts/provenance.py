"""What produced a result: versions, device, precision."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

_PACKAGES = ("kvjax", "jax", "jaxlib", "flax", "numpy", "scipy", "torch")


def software_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages a result depends on."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def device_description() -> dict[str, Any]:
    """Returns the backend JAX computes on, the device's kind, and how many there are."""
    import jax  # here, so that reading provenance does not need a backend

    devices = jax.devices()
    return {"backend": jax.default_backend(), "kind": devices[0].device_kind, "count": len(devices)}
