"""The stage that chooses the probe set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import InputError, command
from kvjax.execution.inputs import OpenedInputs
from kvjax.pipeline.current import Current
from kvjax.pipeline.settings import ProbeSetSettings
from kvjax.task.benchmark import Benchmark
from kvjax.task.probe_set import ProbeSet, frozen_manifest, generate_probe_set


def choose_probe_set(settings: ProbeSetSettings) -> ProbeSet:
    """Chooses and writes a probe set.

    Raises:
      InputError: the benchmark cannot be used, or the file is taken.
    """
    return generate_probe_set(
        Benchmark.open(Path(settings.benchmark_dir)),
        Path(settings.output),
        examples_per_split=settings.examples_per_split,
        fit_examples=settings.fit_examples,
        seed=settings.seed,
    )


def ensure_probe_sets(runs: Sequence[RunDir]) -> None:
    """Makes a probe set in the analysis folder of each run that lacks one, the same for all runs on one benchmark.

    Raises:
      InputError: a run's benchmark or its probe set cannot be used.
    """
    opened = OpenedInputs()
    for run in runs:
        opened.own_probe_set(run.layout.probe_set, opened.benchmark(run.benchmark_dir()))


def probe_set_is_current(run: RunDir, benchmark_dir: Path | None = None) -> Current:
    """Says whether a run has a probe set that is as it was frozen, and of a benchmark; by default the run's own."""
    path = run.layout.probe_set
    if not path.is_file():
        return Current(False, f"{path} does not exist", command("checkpoint-sweep", run_dirs=[run.path]))
    try:
        manifest = frozen_manifest(path)
    except InputError as error:
        return Current(False, str(error))
    if (benchmark := _benchmark_of(run, benchmark_dir)) is not None and not benchmark.hashes.names(
        manifest.benchmark_sha256
    ):
        return Current(False, f"{path} was built from another benchmark than the one in {benchmark.path}")
    return Current(True, f"probe set {manifest.content_sha256[:12]}, unchanged since it was frozen")


def _benchmark_of(run: RunDir, given: Path | None) -> Benchmark | None:
    try:
        return Benchmark.open(given or run.benchmark_dir())
    except InputError:
        return None  # results can be judged without it
