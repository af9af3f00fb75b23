"""The stage that draws a benchmark."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from kvjax.config.benchmark import BenchmarkConfig
from kvjax.config.files import find_config, read_config
from kvjax.errors import InputError, command
from kvjax.pipeline.current import Current
from kvjax.pipeline.settings import GenerateSettings
from kvjax.task.benchmark import Benchmark, generate_benchmark


@dataclasses.dataclass(frozen=True)
class GeneratedBenchmark:
    """A benchmark that was drawn: its directory, and facts of each split."""

    path: Path
    splits: Mapping[str, Mapping[str, int]]


def generate(settings: GenerateSettings) -> GeneratedBenchmark:
    """Draws and writes the benchmark of a config.

    Raises:
      InputError: the config cannot be used, or the directory is taken.
    """
    file = find_config(settings.config, "benchmark")
    config = read_config(file, BenchmarkConfig)
    path = Path(settings.output_dir or config.output_dir)
    written = generate_benchmark(config, path, overwrite=settings.overwrite, source=file)
    return GeneratedBenchmark(path, written["splits"])


def benchmark_is_current(path: Path, config: BenchmarkConfig) -> Current:
    """Says whether a directory holds the benchmark that a config generates."""
    rerun = command("generate-benchmark", config=f"<config of {config.name}>", output_dir=path)
    try:
        benchmark = Benchmark.open(path)
        same = benchmark.has_config(config)
    except InputError as error:
        return Current(False, str(error), rerun)
    if not same:
        return Current(False, f"{path} holds the benchmark {benchmark.name} of another config", rerun)
    return Current(True, f"{path} holds the benchmark {benchmark.name} of this config")
