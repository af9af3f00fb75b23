"""Times how a run's parameters are read: torch.load, the whole conversion, and the parameter store.

    python -m benchmarks.convert --run_dir=… --benchmark_dir=…

It reads a copy of the run, whose files are in the machine's file cache. Each figure is the median of repeats.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from absl import app, flags
from kvjax.converters.cached_loader import CachedLoader
from kvjax.converters.convert import convert_checkpoint
from kvjax.converters.parameter_store import load_tree, read_stored_run

from benchmarks.longer_run import longer_run
from benchmarks.reporting import machine, median_seconds, write_result
from kvjax.artifacts.files import file_sha256
from kvjax.artifacts.run_dir import RunDir
from kvjax.task.benchmark import Benchmark

FLAGS = flags.FLAGS
flags.DEFINE_string("run_dir", None, "The run.", required=True)
flags.DEFINE_string("benchmark_dir", None, "The run's benchmark.")
flags.DEFINE_integer("copies", 8, "How often each checkpoint is taken, to make a longer run.", lower_bound=1)
flags.DEFINE_integer("repeats", 5, "Timed calls; the median is reported.", lower_bound=1)


def main(argv: list[str]) -> None:
    del argv
    with tempfile.TemporaryDirectory() as scratch:
        given = RunDir.open(Path(FLAGS.run_dir))
        benchmark = Benchmark.open(given.benchmark_dir(FLAGS.benchmark_dir))
        run = longer_run(given, FLAGS.copies, Path(scratch) / "run")
        paths = list(run.checkpoints.values())
        tokens = np.ones((16, 56), np.int32)
        loading = median_seconds(lambda: [torch.load(path, weights_only=True) for path in paths], FLAGS.repeats)
        hashing = median_seconds(lambda: [file_sha256(path) for path in paths], FLAGS.repeats)

        def convert(certify_on: np.ndarray | None) -> None:
            for path in paths:
                convert_checkpoint(path, run.config, benchmark, certify_on=certify_on)

        convert(tokens)  # compiles the certificate
        converting = median_seconds(lambda: convert(None), FLAGS.repeats)
        certifying = median_seconds(lambda: convert(tokens), FLAGS.repeats)
        loader = CachedLoader(run, benchmark, certify_on=tokens)
        for path in paths:
            loader.load(path, None)
        loader.save()
        folder = run.layout.converted
        parts = [path / "params" for path in folder.iterdir() if path.is_dir()]
        load_tree(parts[0])  # imports Orbax
        reading = median_seconds(lambda: [load_tree(path) for path in parts], FLAGS.repeats)
        checked = median_seconds(lambda: list(read_stored_run(folder)), FLAGS.repeats)
        size = sum(path.stat().st_size for path in paths)
    result = {
        "what": "parameters of a run's checkpoints, seconds for all of them",
        "machine": machine(),
        "checkpoints": len(paths),
        "megabytes_of_pt": size / 1e6,
        "torch_load": loading,
        "sha256_of_files": hashing,
        "read_and_convert": converting,
        "read_convert_certify": certifying,
        "read_store": reading,
        "read_store_and_check": checked,
        "ratio_torch_load_to_store": loading / reading,
        "ratio_torch_load_to_checked_store": loading / checked,
    }
    path = write_result("convert", result)
    for name, value in result.items():
        if isinstance(value, float):
            print(f"{name:36s} {value:9.3f}")
    print(path)


if __name__ == "__main__":
    app.run(main)
