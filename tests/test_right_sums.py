"""Sums come out right on a CPU, at sizes at which jaxlib 0.10.2 gives wrong ones."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kvjax.right_sums import FLAG


def outcome(code, **environment):
    """Runs code in a process without the flag of this one; returns what it prints, of either kind."""
    bare = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=bare | environment)
    return (done.stdout + done.stderr).strip().splitlines()[-1]


CHECK = "from kvjax.right_sums import check_sums; check_sums(); print('right')"


def test_sums_after_importing_kvjax():
    """Whatever imports kvjax first has right sums, also beside flags of its own."""
    assert outcome(CHECK) == "right"
    own = "--xla_force_host_platform_device_count=2"
    code = f"{CHECK}; import jax; print(jax.device_count())"
    assert outcome(code, XLA_FLAGS=own) == "2"


@pytest.mark.parametrize(("version", "added"), [("0.10.2", f" {FLAG}=-reduce"), ("0.10.1", ""), ("99.0", "")])
def test_flag(version, added):
    """The flag is set for versions that need it, beside flags that are there; others may not know it."""
    code = f"from importlib import metadata; metadata.version = lambda name: '{version}'; import kvjax, os"
    assert outcome(f"{code}; print(os.environ['XLA_FLAGS'])", XLA_FLAGS="--some") == f"--some{added}"


@pytest.mark.parametrize("size", [(16, 11, 24, 128), (32, 16, 25, 128), (2, 16, 200, 128), (16, 20, 16, 128)])
def test_change_through_a_layer_norm(size):
    """What changes of many senders do behind a LayerNorm, computed by NumPy in float64."""
    import jax
    import numpy as np

    from kvjax.model.window_gradients import _through

    rng = np.random.default_rng(0)
    batch, _, width, wide = size
    changes, x, scale = rng.standard_normal(size), rng.standard_normal((batch, width, wide)), rng.standard_normal(wide)
    centred = (x - x.mean(axis=-1, keepdims=True))[:, None]
    deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    normed, expected = centred / deviation, changes - changes.mean(axis=-1, keepdims=True)
    expected = (expected - normed * (normed * expected).mean(axis=-1, keepdims=True)) * scale / deviation
    single = (array.astype(np.float32) for array in (x, changes))
    found = jax.jit(_through)({"scale": scale.astype(np.float32)}, *single)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_jax_that_started_before():
    """JAX that computed before kvjax was imported is refused if its sums are wrong, and told what to do."""
    started = "import jax; jax.numpy.ones(3).block_until_ready()"
    last = outcome(f"{started}; from kvjax.devices import start_jax; start_jax(); print('right')")
    assert last == "right" or "import kvjax before JAX computes anything" in last
