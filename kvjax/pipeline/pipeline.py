"""The whole study in one command: the stages in order, each run if it has something left to do."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from kvjax.artifacts.comparison_schema import read_comparison
from kvjax.artifacts.find_runs import find_run_dirs
from kvjax.artifacts.layout import ComparisonLayout
from kvjax.config.benchmark import BenchmarkConfig
from kvjax.config.files import find_config, read_config
from kvjax.config.train import TrainConfig
from kvjax.errors import InputError, bad_argument, command
from kvjax.intervene.settings import InterventionSettings
from kvjax.pipeline.progress import Progress, no_progress
from kvjax.pipeline.settings import PipelineSettings
from kvjax.pipeline.stages import (
    COMPARE,
    EVALUATE,
    GENERATE,
    INTERVENE,
    PROBE_SET,
    REPORT,
    SWEEP,
    TRAIN,
    WINDOWS,
    Stage,
    Study,
)
from kvjax.pipeline.text import in_minutes
from kvjax.pipeline.train import run_directories
from kvjax.report.text import say
from kvjax.units.unit import IN_PROCESS, Engine

_MAKING = (GENERATE, TRAIN)
_ANALYSIS = (PROBE_SET, SWEEP, WINDOWS, EVALUATE, INTERVENE)


@dataclasses.dataclass(frozen=True)
class StageReport:
    """What became of a stage: whether it was skipped, since its results are current, and the seconds it took."""

    stage: Stage
    skipped: bool
    seconds: float


def run_pipeline(
    settings: PipelineSettings, progress: Progress = no_progress, engine: Engine = IN_PROCESS
) -> list[StageReport]:
    """Runs the stages of a study that have something left to do, and prints a line each.

    A run that diverged before its first step checkpoint is left out of everything after training.

    Args:
      settings: the study.
      progress: shows how far a stage is.
      engine: what does units of work, such as a run's sweep.

    Raises:
      InputError: a config or run cannot be used, no run saved a checkpoint, or a stage refuses; what earlier stages
        wrote stays.
    """
    planned, stages = dataclasses.replace(study_of(settings), engine=engine), stages_of(settings)
    reports = []
    for number, stage in enumerate(stages, start=1):
        label, began = f"{number}/{len(stages)}  {stage.name}", time.monotonic()
        study = planned if stage in _MAKING else planned.measured()
        state = stage.current(study)
        if not state.holds:
            say(f"{label} ({state.reason})")
            stage.run(study, progress)
        seconds = time.monotonic() - began
        say(f"{label}: {'current, skipped' if state.holds else f'done in {in_minutes(seconds)}'}")
        reports.append(StageReport(stage, state.holds, seconds))
    return reports


def stages_of(settings: PipelineSettings) -> tuple[Stage, ...]:
    """Lists the stages of a study; runs that exist are not trained, and one run is not compared."""
    trained = settings.run_dirs is not None
    several = len(study_of(settings).runs) > 1
    return (*(() if trained else _MAKING), *_ANALYSIS, *((COMPARE,) if several else ()), REPORT)


def study_of(settings: PipelineSettings) -> Study:
    """Says where the parts of a study lie, and what they are made from.

    Raises:
      InputError: a config or a run cannot be used.
    """
    output, interventions = Path(settings.output_dir), InterventionSettings(pairs_per_kind=settings.pairs_per_kind)
    places = {
        "ranking": output / "ranking.json",
        "comparison": output / "comparison",
        "report": output / "report.html",
        "interventions": interventions,
    }
    if settings.run_dirs is not None:
        found = find_run_dirs(settings.run_dirs, needs="checkpoints")
        benchmark_dir = found[0].benchmark_dir(None)
        return Study(benchmark_dir, None, {run.path: run.config for run in found}, **places)
    config = read_config(find_config(settings.config, "train"), TrainConfig)
    benchmark = read_config(_benchmark_config(settings), BenchmarkConfig)
    config = config.model_copy(update={"benchmark_dir": str((output / "benchmark").resolve())})
    seeds = settings.seeds or (config.seed,)
    return Study(output / "benchmark", benchmark, run_directories(config, seeds, str(output / "runs")), **places)


def _benchmark_config(settings: PipelineSettings) -> Path:
    """Finds the benchmark config: the one named, or the shipped one of the training config's name."""
    if settings.benchmark_config is not None:
        return find_config(settings.benchmark_config, "benchmark")
    try:
        return find_config(Path(settings.config).stem, "benchmark")
    except InputError as error:
        expected = f"a benchmark config, for none has the name of the training config ({error})"
        raise bad_argument("benchmark_config", expected, "none") from None


def print_summary(settings: PipelineSettings, reports: list[StageReport]) -> None:
    """Prints what was done, what was found, and where to look."""
    study = study_of(settings)
    ran = [report for report in reports if not report.skipped]
    total = in_minutes(sum(report.seconds for report in reports))
    say(f"\n{len(ran)} of {len(reports)} stages run in {total}, the others were current.")
    for run in study.measurable().open_runs():
        say(f"  {run.path}: story in {run.layout.story_text}")
    for run in study.diverged_early():
        say(f"  {run.path}: in no result; it diverged at step {run.diverged_at}, before its first step checkpoint")
    layout = ComparisonLayout(study.comparison)
    if layout.comparison.is_file():
        compared = read_comparison(layout.comparison)
        say(f"\nComparison of {len(compared.runs)} runs:")
        for sentence in compared.findings:
            say(f"- {sentence}")
        say(f"\nComparison with tables and figures: {layout.page}")
    say(f"\nOpen {study.report} in a browser: everything above, with figures.")
    say(f"Next: {command('status', run_dirs=list(study.runs))}")
