"""The stage that converts the checkpoints of runs, and back."""

from __future__ import annotations

from kvjax.artifacts.files import file_sha256
from kvjax.artifacts.run_dir import RunDir
from kvjax.converters.convert_run import ConversionReport, convert_run, export_run
from kvjax.converters.parameter_store import stored_sha256s
from kvjax.errors import command
from kvjax.pipeline.current import Current
from kvjax.pipeline.progress import Progress, no_progress
from kvjax.pipeline.settings import DEFAULT_RESULTS, ConvertSettings, ResultSettings, RunsOnBenchmark
from kvjax.pipeline.written_runs import open_to_write
from kvjax.task.benchmark import Benchmark


def convert(
    runs: RunsOnBenchmark,
    settings: ConvertSettings,
    progress: Progress = no_progress,
    results: ResultSettings = DEFAULT_RESULTS,
) -> list[ConversionReport]:
    """Converts every step checkpoint of runs into the parameter stores beside them, or the stored ones back.

    Raises:
      InputError: a run, its benchmark or a checkpoint cannot be used, or a conversion does not verify.
    """
    reports = []
    with (
        open_to_write(runs, results) as found,
        progress(sum(len(run.checkpoints) for run in found), "checkpoints") as advance,
    ):
        for run in found:
            if settings.to == "torch":
                reports.append(export_run(run, verify=settings.verify, advance=advance))
            else:
                benchmark = Benchmark.open(run.benchmark_dir(runs.benchmark_dir))
                reports.append(convert_run(run, benchmark, verify=settings.verify, advance=advance))
    return reports


def conversion_is_current(run: RunDir) -> Current:
    """Says whether the store beside a run holds every step checkpoint, as its file is now."""
    rerun = command("convert", run_dirs=[run.path])
    stored = stored_sha256s(run.layout.converted)
    missing = [step for step, path in run.checkpoints.items() if file_sha256(path) not in stored]
    if missing or not run.checkpoints:
        reason = f"{len(missing)} of {len(run.checkpoints)} checkpoints are not in {run.layout.converted}"
        return Current(False, reason, rerun)
    return Current(True, f"all {len(run.checkpoints)} checkpoints are in {run.layout.converted}")
