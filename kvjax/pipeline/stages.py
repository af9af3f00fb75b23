"""The stages of a study, in the order in which it runs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvjax.artifacts.layout import ComparisonLayout
from kvjax.artifacts.run_dir import RunDir
from kvjax.compare.aligned import named_runs
from kvjax.compare.compared_roles import unpatched
from kvjax.compare.settings import CompareSettings
from kvjax.config.benchmark import BenchmarkConfig
from kvjax.config.run import RunConfig
from kvjax.errors import unusable
from kvjax.intervene.analysis import InterventionReport
from kvjax.intervene.settings import InterventionSettings
from kvjax.pipeline.compare_seeds import FEWEST_RUNS, WrittenComparison, compare_seeds, comparison_is_current
from kvjax.pipeline.convert import conversion_is_current, convert
from kvjax.pipeline.current import Current, all_current
from kvjax.pipeline.evaluate import evaluate, evaluation_is_current
from kvjax.pipeline.generate import benchmark_is_current
from kvjax.pipeline.interventions import intervene, interventions_are_current
from kvjax.pipeline.over_runs import on_all_runs, over_runs
from kvjax.pipeline.probe_set import ensure_probe_sets, probe_set_is_current
from kvjax.pipeline.progress import Progress
from kvjax.pipeline.report import report, report_is_current
from kvjax.pipeline.select_reference import rank_runs, ranking_is_current
from kvjax.pipeline.settings import (
    DEFAULT_RESULTS,
    ComparisonOutput,
    ConvertSettings,
    EvaluateSettings,
    PairSource,
    ReportSettings,
    Runs,
    RunsOnBenchmark,
    SelectSettings,
    SweepInputs,
    WindowSettings,
)
from kvjax.pipeline.story import story_is_current
from kvjax.pipeline.sweep import sweep_over_runs
from kvjax.pipeline.sweep_state import sweep_is_current
from kvjax.pipeline.train import runs_are_trained, train_missing_runs
from kvjax.pipeline.train_apart import TrainingGroup, train_apart
from kvjax.pipeline.windows import find_birth_windows, windows_are_current, windows_are_identified
from kvjax.story.confirmations import KIND
from kvjax.sweeps.settings import SweepSettings
from kvjax.task.benchmark import Benchmark, generate_benchmark
from kvjax.units.unit import IN_PROCESS, Engine

DEFAULT_INTERVENTIONS = InterventionSettings()


@dataclasses.dataclass(frozen=True)
class Study:
    """A benchmark, the runs trained on it, and where everything about them lies.

    Attributes:
      benchmark_dir: the benchmark.
      benchmark_config: what it is drawn from; None if it is there already.
      runs: run directory -> what it is trained from, or was.
      ranking: the file that ranks the runs.
      comparison: the folder of the comparison of the runs.
      report: the HTML file about all of it.
      interventions: what is done in windows, and how.
      engine: what runs units of work.
    """

    benchmark_dir: Path
    benchmark_config: BenchmarkConfig | None
    runs: Mapping[Path, RunConfig]
    ranking: Path
    comparison: Path
    report: Path
    interventions: InterventionSettings = DEFAULT_INTERVENTIONS
    engine: Engine = IN_PROCESS

    def open_runs(self) -> list[RunDir]:
        """Opens the run directories.

        Raises:
          InputError: one is not there yet.
        """
        return [RunDir.open(path) for path in self.runs]

    def diverged_early(self) -> list[RunDir]:
        """Finds the runs that diverged before their first step checkpoint: nothing can be measured on them."""
        there = [RunDir.open(path) for path in self.runs if path.is_dir()]
        return [run for run in there if run.diverged_at is not None and not run.checkpoints]

    def measurable(self) -> Study:
        """Leaves out the runs that diverged before their first step checkpoint."""
        left_out = {run.path for run in self.diverged_early()}
        return dataclasses.replace(self, runs={path: of for path, of in self.runs.items() if path not in left_out})

    def measured(self) -> Study:
        """Leaves out the runs that cannot be measured.

        Raises:
          InputError: none is left.
        """
        left = self.measurable()
        if not left.runs:
            expected = "a step checkpoint of at least one run (lower the learning rate)"
            raise unusable(", ".join(map(str, self.runs)), expected, "none, for all diverged before their first")
        return left


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of a study.

    Attributes:
      name: of the stage.
      command: the command that runs it alone.
      needs: names of the stages whose results it reads.
      current: says whether it has nothing left to do.
      run: does what is left to do, with default settings, and returns what the command prints.
    """

    name: str
    command: str
    needs: tuple[str, ...]
    current: Callable[[Study], Current]
    run: Callable[[Study, Progress], Any]


def _of_every_run(current: Callable[[RunDir], Current]) -> Callable[[Study], Current]:
    """Lifts a question about a run to one about the runs of a study."""

    def of_study(study: Study) -> Current:
        missing = [path for path in study.runs if not path.is_dir()]
        if missing:
            return Current(False, f"{missing[0]} does not exist")
        return all_current(current(run) for run in study.open_runs())

    return of_study


def _generate(study: Study, progress: Progress) -> Benchmark:
    if not study.benchmark_dir.exists():
        generate_benchmark(study.benchmark_config, study.benchmark_dir, overwrite=False)
    benchmark = Benchmark.open(study.benchmark_dir)
    if not benchmark.has_config(study.benchmark_config):
        expected = f"the benchmark of the config {study.benchmark_config.name} (or another `output_dir`)"
        raise unusable(study.benchmark_dir, expected, f"the benchmark {benchmark.name} of another config")
    return benchmark


def _train(study: Study, progress: Progress) -> list[RunDir]:
    if study.engine.spreads:
        train_apart([TrainingGroup(study.runs, study.benchmark_dir)], study.engine, progress)
        return study.open_runs()
    steps = sum(config.num_steps for config in study.runs.values())
    with progress(steps, "steps") as advance:
        train_missing_runs(study.runs, Benchmark.open(study.benchmark_dir), advance=advance)
    return study.open_runs()


def _runs(study: Study) -> RunsOnBenchmark:
    return RunsOnBenchmark.of(study.runs)


def _over(name: str, stage: Callable[..., Any], study: Study, progress: Progress, *given: Any) -> list[Any]:
    return over_runs(name, stage, *given, results=DEFAULT_RESULTS, progress=progress, engine=study.engine)


def _has_best(run: RunDir) -> bool:
    """Checks whether a run recorded a best checkpoint; one that diverged before its first evaluation has none."""
    return run.layout.best_record.is_file()


def _is_evaluated(run: RunDir) -> Current:
    return evaluation_is_current(run) if _has_best(run) else Current(True, "it recorded no best checkpoint to evaluate")


def _evaluate(study: Study, progress: Progress) -> list[Any]:
    runs = RunsOnBenchmark.of([run.path for run in study.open_runs() if _has_best(run)])
    return _over("evaluation", evaluate, study, progress, runs, EvaluateSettings())


def _report_settings(study: Study) -> ReportSettings:
    comparison = str(study.comparison) if ComparisonLayout(study.comparison).comparison.is_file() else None
    return ReportSettings(
        run_dirs=tuple(map(str, study.runs)),
        comparison_dir=comparison if len(study.runs) > 1 else None,
        output=str(study.report),
        benchmark_dir=str(study.benchmark_dir),
    )


def _is_compared(study: Study) -> Current:
    if len(study.runs) < FEWEST_RUNS:
        return Current(True, "fewer than two runs to compare")
    return comparison_is_current(study.open_runs(), study.comparison)


def _compare(study: Study) -> WrittenComparison:
    folder = str(study.comparison)
    ended_early = any(run.diverged_at is not None for run in study.open_runs())  # such a run lacks the later steps
    settings = CompareSettings(align="intersection") if ended_early else CompareSettings()
    given = (Runs.of(study.runs), settings, ComparisonOutput(output_dir=folder))
    return on_all_runs("comparison", compare_seeds, folder, *given, engine=study.engine)


def _with_windows(study: Study) -> list[RunDir]:
    """Finds the runs in which something formed; nothing is intervened in the others."""
    return [run for run in study.open_runs() if windows_are_identified(run).holds]


def _patching(study: Study) -> Iterator[tuple[RunDir, InterventionSettings]]:
    """Says which runs to patch, and at which checkpoints, where roles are compared and no window had them patched."""
    runs = named_runs(study.open_runs())
    steps = unpatched(runs) if len(runs) > 1 else {}
    for one in runs:
        if one.name in steps:
            at = ",".join(map(str, steps[one.name]))
            yield one.run, dataclasses.replace(study.interventions, kinds=(KIND,), steps=at, force=True)


def _interventions_are_made(study: Study) -> Current:
    missing = [path for path in study.runs if not path.is_dir()]
    if missing:
        return Current(False, f"{missing[0]} does not exist")
    looked_for = all_current(windows_are_current(run) for run in study.open_runs())
    if not looked_for.holds:
        return looked_for
    in_windows = [interventions_are_current(run, study.interventions) for run in _with_windows(study)]
    if in_windows and not all_current(in_windows).holds:
        return all_current(in_windows)
    states = [*in_windows, *(interventions_are_current(run, settings) for run, settings in _patching(study))]
    return all_current(states) if states else Current(True, "no run has a birth window to intervene in")


def _intervene(study: Study, progress: Progress) -> list[InterventionReport]:
    in_windows = [run.path for run in _with_windows(study)]
    reports = _intervene_in(in_windows, study.interventions, study, progress) if in_windows else []
    alike: dict[InterventionSettings, list[Path]] = {}
    for run, settings in _patching(study):
        alike.setdefault(settings, []).append(run.path)
    for settings, runs in alike.items():  # runs in one call share workers, and compiled programs
        reports += _intervene_in(runs, settings, study, progress)
    return reports


def _intervene_in(
    runs: Sequence[Path], settings: InterventionSettings, study: Study, progress: Progress
) -> list[InterventionReport]:
    return _over("interventions", intervene, study, progress, RunsOnBenchmark.of(runs), PairSource(), settings)


GENERATE = Stage(
    "generate",
    "generate-benchmark",
    (),
    lambda study: benchmark_is_current(study.benchmark_dir, study.benchmark_config),
    _generate,
)
TRAIN = Stage("train", "train", ("generate",), lambda study: runs_are_trained(study.runs), _train)
CONVERT = Stage(
    "convert",
    "convert",
    ("train",),
    _of_every_run(conversion_is_current),
    lambda study, progress: _over("conversion", convert, study, progress, _runs(study), ConvertSettings()),
)
EVALUATE = Stage("evaluate", "evaluate", ("generate", "train"), _of_every_run(_is_evaluated), _evaluate)
SELECT = Stage(
    "select",
    "select-reference",
    ("generate", "train"),
    lambda study: ranking_is_current(study.open_runs(), study.ranking),
    lambda study, progress: rank_runs(_runs(study), SelectSettings(output=str(study.ranking)), progress, study.engine),
)
PROBE_SET = Stage(
    "probe set",
    "generate-probe-set",
    ("generate",),
    _of_every_run(probe_set_is_current),
    lambda study, progress: ensure_probe_sets(study.open_runs()),
)
SWEEP = Stage(
    "sweep",
    "checkpoint-sweep",
    ("train", "probe set"),
    _of_every_run(sweep_is_current),
    lambda study, progress: sweep_over_runs(
        _runs(study), SweepInputs(), SweepSettings(), progress, engine=study.engine
    ),
)
WINDOWS = Stage(
    "windows",
    "birth-windows",
    ("sweep",),
    _of_every_run(lambda run: all_current(current(run) for current in (windows_are_current, story_is_current))),
    lambda study, progress: _over(
        "search for windows", find_birth_windows, study, progress, Runs.of(study.runs), WindowSettings()
    ),
)
INTERVENE = Stage("intervene", "intervene", ("windows",), _interventions_are_made, _intervene)
COMPARE = Stage(
    "compare",
    "compare-seeds",
    ("windows",),
    _is_compared,
    lambda study, progress: _compare(study),
)
REPORT = Stage(
    "report",
    "report",
    ("sweep",),
    lambda study: report_is_current(_report_settings(study)),
    lambda study, progress: on_all_runs(
        "report", report, str(study.report), _report_settings(study), engine=study.engine, progress=progress
    ),
)

STAGES = (GENERATE, TRAIN, CONVERT, EVALUATE, SELECT, PROBE_SET, SWEEP, WINDOWS, INTERVENE, COMPARE, REPORT)
