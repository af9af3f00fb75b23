"""The compilation cache: private, used again by the next process, and off when asked."""

import os
import stat
import subprocess
import sys

from kvjax.runtime import CACHE_VARIABLE

_COMPILE = (
    "import jax; from kvjax.runtime import use_compilation_cache; folder = use_compilation_cache();"
    "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0);"
    "jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8))); print(folder)"
)


def run(folder, code=_COMPILE):
    environment = {**os.environ, CACHE_VARIABLE: str(folder)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_programs_are_kept_in_a_folder_that_is_nobody_elses(tmp_path):
    folder = tmp_path / "cache" / "compiled"
    assert run(folder) == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    first = {path.name for path in folder.iterdir()}
    assert first
    run(folder)
    assert {path.name for path in folder.iterdir() if path.name.endswith("-cache")} == {
        name for name in first if name.endswith("-cache")
    }, "the second process found its programs"


def test_a_folder_others_may_write_to_is_closed_first(tmp_path):
    folder = tmp_path / "open"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    run(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_that_cannot_be_made_turns_the_cache_off(tmp_path):
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file" / "cache") == "None"
