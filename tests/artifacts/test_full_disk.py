"""A disk that takes no more: one line that names the file, nothing half-written, and what stood there before."""

import contextlib
import errno
import os
import resource

import numpy as np
import pytest
import xarray as xr

from kvjax.artifacts.checkpoint_sums import ResultStore
from kvjax.artifacts.files import replace_directory, replace_file, write_json, write_json_lines
from kvjax.artifacts.tables import write_datasets
from kvjax.config.benchmark import BenchmarkConfig
from kvjax.errors import InputError
from kvjax.task.benchmark import generate_benchmark
from tests.helpers.building import small_benchmark_config

LARGE = np.random.default_rng(0).normal(size=200_000)


@contextlib.contextmanager
def largest_file(size):
    """Lets no file of this process grow beyond a size; the system answers as it does for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_sums(path):
    ResultStore(path.parent, {}).save(path.stem, "key", 1, {"x": LARGE}, {})


def save_benchmark(path):
    generate_benchmark(BenchmarkConfig.model_validate(small_benchmark_config()), path, overwrite=True)


WRITERS = {
    "a.json": lambda path: write_json(path, LARGE.tolist()),
    "a.jsonl": lambda path: write_json_lines(path, [{"x": x} for x in LARGE.tolist()]),
    "a.npz": save_sums,
    "a.nc": lambda path: write_datasets(path, [(None, xr.Dataset({"x": ("n", LARGE)}))]),
    "benchmark": save_benchmark,
}


@pytest.mark.parametrize("name", WRITERS)
def test_file_that_grows_too_large(tmp_path, name):
    """Every writer of results names the file it could not write, and leaves no partial one."""
    path = tmp_path / name
    with largest_file(100_000), pytest.raises(InputError) as refusal:
        WRITERS[name](path)
    line = str(refusal.value)
    assert line.startswith(str(path)) and "File too large" in line and "that can be written" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize("replace", [replace_file, replace_directory])
def test_what_stood_there_before(tmp_path, code, replace):
    """Whatever the system says against writing, the earlier file or directory stays as it was."""
    path = tmp_path / "result"
    with replace(path) as partial:
        (partial / "a" if partial.is_dir() else partial).write_text("earlier")
    complaint = f"^{path}: expected .* that can be written; found {os.strerror(code)}$"
    with pytest.raises(InputError, match=complaint), replace(path):
        raise OSError(code, os.strerror(code))
    assert (path / "a" if path.is_dir() else path).read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_error_of_another_file(tmp_path):
    """An error of a file that is only read, and a closed pipe, are not blamed on the file that is written."""
    for error in (BrokenPipeError(errno.EPIPE, "Broken pipe"), PermissionError(errno.EACCES, "no", "elsewhere")):
        with pytest.raises(type(error)), replace_file(tmp_path / "result"):
            raise error
    assert list(tmp_path.iterdir()) == []
