"""Times calls, describes the machine, and writes results as JSON, for all benchmark scripts."""

from __future__ import annotations

import datetime
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch

from kvjax.artifacts.files import write_json
from kvjax.artifacts.provenance import software_versions
from kvjax.devices import device_description
from kvjax.machine import available_cores

RESULTS = Path(__file__).parent / "results"


def median_seconds(function: Callable[[], Any], repeats: int) -> float:
    """Measures the median wall-clock seconds of a call, waiting for its result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matmul_gflops(size: int = 2048, repeats: int = 5) -> float:
    """Measures the rate of a large float32 matrix product at highest precision: the machine's practical peak."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.float32)
    product = jax.jit(lambda x: jnp.matmul(x, x, precision="highest"))
    product(a).block_until_ready()
    return 2 * size**3 / median_seconds(lambda: product(a), repeats) / 1e9


def machine() -> dict[str, Any]:
    """Describes the device, the cores this process may use, the CPU's model, and the versions of the libraries."""
    return {
        "device": device_description(),
        "cores": available_cores(),
        "cpu": _cpu_model(),
        "matmul_2048_float32_gflops": round(matmul_gflops(), 1),
        "versions": software_versions(),
        "date": datetime.date.today().isoformat(),
    }


def _cpu_model() -> str:
    """Names the CPU and its widest vectors, on which every timing depends."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    named = re.search(r"model name\s*:\s*(.+)", info)
    vectors = next((name for name in ("avx512f", "avx2") if name in info), "no wide vectors")
    return f"{named[1] if named else platform.machine()}, {vectors}"


def torch_device() -> torch.device | None:
    """Chooses the device of PyTorch peers, of the kind that JAX computes on; None if this PyTorch has none.

    A peer on a CPU beside kvjax on a GPU would not be a fair comparison.
    """
    if jax.default_backend() == "cpu":
        torch.set_num_threads(available_cores())
        return torch.device("cpu")
    return torch.device("cuda") if torch.cuda.is_available() else None


def result_path(name: str, described: dict[str, Any]) -> Path:
    """Names the JSON of a benchmark by the device of a machine."""
    device = described["device"]
    kind = f"{described['cores']}cores" if device["backend"] == "cpu" else f"{device['count']}x_{device['kind']}"
    return RESULTS / f"{name}_{device['backend']}_{re.sub(r'[^a-z0-9]+', '_', kind.lower())}.json"


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Writes a benchmark's JSON, named by its device, and returns its path."""
    path = result_path(name, result["machine"])
    write_json(path, result)
    return path
