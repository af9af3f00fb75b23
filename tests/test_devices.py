"""What JAX takes of a machine, and the compilation cache: private, used again by the next process, off when asked."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import jaxlib.xla_client
import numpy as np
import pytest

from kvjax import devices
from kvjax.devices import CACHE_VARIABLE, Placement, fillable_memory_gb
from kvjax.errors import InputError

_COMPILE = (
    "import jax; from kvjax.devices import use_compilation_cache; folder = use_compilation_cache();"
    "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0);"
    "jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8))); print(folder)"
)


def run(folder, code=_COMPILE):
    environment = {**os.environ, CACHE_VARIABLE: str(folder)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_private_cache_folder(tmp_path):
    """Programs are kept in a folder of mode 700, and the next process finds them."""
    folder = tmp_path / "cache" / "compiled"
    assert run(folder) == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    first = {path.name for path in folder.iterdir()}
    assert first
    run(folder)
    assert {path.name for path in folder.iterdir() if path.name.endswith("-cache")} == {
        name for name in first if name.endswith("-cache")
    }, "the second process found its programs"


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702])
def test_writable_cache_folder(tmp_path, mode):
    """A folder that others may write to is not used."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    assert run(folder) == "None"
    assert stat.S_IMODE(folder.stat().st_mode) == mode and not list(folder.iterdir())


def test_readable_cache_folder(tmp_path):
    """A folder that others may read is closed to them."""
    folder = tmp_path / "readable"
    folder.mkdir()
    folder.chmod(0o755)
    assert run(folder) == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_missing_cache_folder(tmp_path):
    """A folder that cannot be made turns the cache off."""
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file" / "cache") == "None"


def test_user_without_a_home(tmp_path, monkeypatch):
    """Without a home there is no folder to trust, and none is needed if a variable names it."""

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    for name in ("XDG_CACHE_HOME", CACHE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    assert devices.use_compilation_cache() is None and devices.lowered_folder() is None
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    assert devices.cache_folder() == tmp_path / "cache"


def test_wrong_sums_of_a_cpu(monkeypatch):
    """Whatever asks for the backend first finds out that known sums come out wrong."""

    def wrong():
        raise InputError("expected sums that are right to rounding")

    monkeypatch.setattr(devices, "check_sums", wrong)
    with pytest.raises(InputError, match="right to rounding"):
        devices.backend()


def test_command_without_cache(tmp_path):
    """`--nocompilation_cache` turns the cache off for one command, also if it was on; the next may turn it on."""
    code = (
        "import jax; from kvjax.commands import flags, runtime; from kvjax.pipeline.settings import Runtime;"
        "from kvjax.devices import lowered_folder;"
        "values = flags.flags_of([Runtime]); start = lambda: runtime.start_jax(flags.read_settings(values, Runtime));"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0);"
        "compile = lambda n: jax.jit(lambda x: x @ x + n)(jax.numpy.ones((8, 8)));"
        "values(['x']); start(); compile(1);"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0);"
        "values.unparse_flags(); values(['x', '--nocompilation_cache']); start();"
        "before = sorted(p.name for p in __import__('pathlib').Path('CACHE').iterdir()); compile(2);"
        "after = sorted(p.name for p in __import__('pathlib').Path('CACHE').iterdir());"
        "from kvjax.devices import start_jax; start_jax();"
        "print(before == after, jax.config.jax_compilation_cache_dir, lowered_folder());"
        "values.unparse_flags(); values(['x']); start();"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0); compile(3);"
        "print(lowered_folder() is not None, len(list(__import__('pathlib').Path('CACHE').iterdir())) > len(before))"
    )
    assert run(tmp_path / "cache", code.replace("CACHE", str(tmp_path / "cache"))) == "True None None\nTrue True"


def test_switch_of_jax(tmp_path, monkeypatch):
    """JAX's own switch turns the cache off, and stays as it is."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "0")
    code = _COMPILE + "; from kvjax.devices import lowered_folder; print(lowered_folder())"
    assert run(tmp_path / "cache", code) == f"{tmp_path / 'cache'}\nNone"
    assert list((tmp_path / "cache").iterdir()) == []


def test_number_of_cpu_devices(tmp_path, monkeypatch):
    """Each core is a device, unless the number was chosen before."""
    code = "from kvjax.devices import start_jax; start_jax(); import jax; print(jax.local_device_count())"
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert run(tmp_path / "cache", code) == str(len(os.sched_getaffinity(0)))
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    assert run(tmp_path / "cache", code) == "3"


def test_share_of_the_machine(monkeypatch):
    """A sweep may fill half of the memory there is."""
    monkeypatch.setattr(devices, "machine_memory_bytes", lambda: 4_000_000_000)
    assert fillable_memory_gb() == 2.0


def test_bound_of_an_accelerator(monkeypatch):
    """A bound that a person gives limits what JAX may allocate, of which a part is filled; on a CPU it is filled."""
    assert fillable_memory_gb(5.0) == 5.0
    monkeypatch.setattr(devices, "backend", lambda: "gpu")
    monkeypatch.setattr(devices, "_accelerator_limit", lambda: 60_000_000_000)
    assert fillable_memory_gb(20.0) == pytest.approx(14.0)
    assert fillable_memory_gb(100.0) == fillable_memory_gb() == pytest.approx(42.0)


MEMORY = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")


def handed_to_jax(monkeypatch, gb):
    """Bounds the memory, and returns the options that JAX's GPU plugin starts with."""
    devices.bound_accelerator_memory(gb)
    options = {name: os.environ[name] for name in MEMORY if name in os.environ}
    found = jaxlib.xla_client.generate_pjrt_gpu_plugin_options()
    for name in options:
        monkeypatch.delenv(name)
    return found


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A function that makes NVIDIA's tool list GPUs of so many MiB."""
    for name in MEMORY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    tool = tmp_path / "nvidia-smi"

    def lists(*mebibytes, status=0):
        lines = "\n".join(map(str, mebibytes))
        tool.write_text(f"#!/bin/sh\nprintf '{lines}\n'\nexit {status}\n")
        tool.chmod(0o755)

    return lists


def test_memory_that_jax_takes(driver, monkeypatch):
    """JAX gets the bound as a share of the smallest GPU, at most all of it; without a size it takes none beforehand."""
    options = handed_to_jax(monkeypatch, 20.0)
    assert options["preallocate"] is False and "memory_fraction" not in options
    driver(81920, 40960)
    assert handed_to_jax(monkeypatch, 20.0)["memory_fraction"] == pytest.approx(20e9 / (40960 * 2**20), abs=1e-4)
    assert handed_to_jax(monkeypatch, 500.0)["memory_fraction"] == 1.0
    driver("[N/A]")
    assert handed_to_jax(monkeypatch, 20.0)["preallocate"] is False
    driver(40960, status=9)
    assert handed_to_jax(monkeypatch, 20.0)["preallocate"] is False


@pytest.mark.parametrize("name", MEMORY[:2])
def test_memory_that_the_environment_names(driver, monkeypatch, name):
    """A share that somebody has set stays as it is."""
    driver(81920)
    monkeypatch.setenv(name, "0.125")
    devices.bound_accelerator_memory(20.0)
    assert os.environ[name] == "0.125" and not [other for other in MEMORY if other != name and other in os.environ]


def test_threads_under_a_quota(tmp_path):
    """XLA starts threads for as many cores as the quota allows, unless told otherwise."""
    code = (
        "import os, jax; from kvjax import devices; devices.available_cores = lambda: 1; devices.share_cpu_cores();"
        "jax.jit(lambda x: x @ x)(jax.numpy.ones((8, 8))).block_until_ready();"
        "print(len(os.listdir('/proc/self/task')))"
    )
    few = int(run(tmp_path, code))
    many = int(run(tmp_path, "import os; os.environ['PJRT_NPROC'] = '9';" + code))
    assert few + 8 <= many


@pytest.mark.parametrize("split", [(True, False), (True, True)])
def test_placement_of_shared_arrays(split):
    """A function of each device's part gives what it gives of everything on one device."""

    def scaled(part, other):
        return part * other.sum() if other.ndim == 1 else part + other

    part = np.arange(8.0, dtype=np.float32).reshape(4, 2)
    other = part + 1 if split[1] else np.arange(3.0, dtype=np.float32)
    alone, shared = (jax.jit(Placement(n).on_each_device(scaled, split))(part, other) for n in (1, 2))
    np.testing.assert_array_equal(shared, alone)


def test_parts_of_shared_arrays():
    """Parts come in the devices' order, and joined again they are the array."""
    placement, x = Placement(2), np.arange(6.0, dtype=np.float32).reshape(6, 1)
    shared = jax.device_put(x, placement.split)
    first, second = placement.parts(shared)
    np.testing.assert_array_equal(first, x[:3])
    joined = placement.joined([second, first])
    np.testing.assert_array_equal(joined, np.concatenate([x[3:], x[:3]]))
    assert joined.sharding == placement.split


@pytest.mark.parametrize("name", ["jax_debug_nans", "jax_debug_infs", "jax_disable_jit"])
def test_debugging(name):
    """Work from Python is refused in one line while JAX is debugged: NaN stands for values that do not exist here."""
    jax.config.update(name, True)
    try:
        with pytest.raises(InputError, match=f"^jax.config.{name}: expected False .*; found True$"):
            devices.start_jax()
    finally:
        jax.config.update(name, False)
