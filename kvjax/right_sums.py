"""Keeps XLA from giving wrong sums on CPUs.

jaxlib 0.10.2 hands reductions to a library (YNNPACK) that computes some of them wrongly, without a word: in
`x - n[:, None] * mean(n[:, None] * x)`, of 16 × 11 × 24 rows of 128 numbers, all rows of the eleventh are wrong. Sizes
of real interventions are among them, those of tests were not. kvjax is not installed with 0.10.2; where that is there
all the same, or 0.11.0, which has the library too, a flag that JAX reads when it starts its backend keeps reductions
where 0.10.1 has them. Other versions may not know the flag, and XLA ends a process at one that it does not know.
"""

from __future__ import annotations

import functools
import os
from importlib import metadata

from kvjax.errors import InputError

FLAG = "--xla_cpu_experimental_ynn_fusion_type"
_FLAGGED = ("0.10.2", "0.11.0")
_LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"  # of XLA: 3 lets nothing through but what ends the process


def keep_reductions_from_ynnpack() -> None:
    """Sets the flag, unless whoever started the process has chosen; it counts if JAX has not started yet."""
    flags, version = os.environ.get("XLA_FLAGS", ""), _jaxlib()
    if FLAG not in flags and version in _FLAGGED:
        os.environ["XLA_FLAGS"] = f"{flags} {FLAG}=-reduce".strip()
    if version == "0.10.1" and os.environ.get(_LOG_LEVEL, "1") == "1":  # to which JAX sets it
        # It calls two hints to the compiler unsupported by the machine, in two lines for each program that it loads.
        os.environ[_LOG_LEVEL] = "3"


@functools.cache
def check_sums() -> None:
    """Computes sums that are known, on JAX's default device and once in a process.

    Raises:
      InputError: they come out wrong.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    rows = np.broadcast_to(np.arange(128, dtype=np.float32) % 7, (16, 11, 24, 128))
    ones = np.ones((16, 24, 128), np.float32)

    @jax.jit
    def centred(rows: jax.Array, ones: jax.Array) -> jax.Array:
        return rows - ones[:, None] * jnp.mean(ones[:, None] * rows, axis=-1, keepdims=True)

    worst = np.abs(np.asarray(centred(rows, ones)) - (rows - rows.mean(axis=-1, keepdims=True))).max()
    if worst > 1e-3:
        raise InputError(
            f"jaxlib {_jaxlib()}: expected sums that are right to rounding; found some wrong by {worst:.1g} (import "
            f"kvjax before JAX computes anything, or set XLA_FLAGS={FLAG}=-reduce)"
        )


def _jaxlib() -> str:
    try:
        return metadata.version("jaxlib")
    except metadata.PackageNotFoundError:
        return ""
