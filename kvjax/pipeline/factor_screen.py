"""Runs a factor screen: every setting trained and measured like any study, then a comparison per factor."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xarray as xr

from kvjax.artifacts.factor_schema import read_factor, write_factor
from kvjax.artifacts.files import read_json
from kvjax.artifacts.layout import ComparisonLayout, RunLayout
from kvjax.artifacts.provenance import software_versions
from kvjax.artifacts.results import RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.tables import SCHEMA_VERSION
from kvjax.compare.aligned import SweptRun, align
from kvjax.compare.factor_findings import factor_findings
from kvjax.compare.factors import ScreenedRun, Setting, compare_settings
from kvjax.compare.settings import CompareSettings
from kvjax.config.train import TrainConfig
from kvjax.errors import InputError
from kvjax.pipeline.compare_seeds import FEWEST_RUNS, compare_seeds, comparison_is_current
from kvjax.pipeline.comparison_files import check_comparison_files, write_comparison_files
from kvjax.pipeline.current import Current, all_current
from kvjax.pipeline.factor_plan import PlannedSetting, ScreenPlan
from kvjax.pipeline.progress import Progress, no_progress
from kvjax.pipeline.settings import (
    ComparisonOutput,
    ResultSettings,
    Runs,
    RunsOnBenchmark,
    SweepInputs,
)
from kvjax.pipeline.stages import EVALUATE, GENERATE, PROBE_SET, SWEEP, TRAIN, WINDOWS, Stage, Study
from kvjax.pipeline.sweep import sweep_over_runs
from kvjax.pipeline.sweep_state import sweep_is_current
from kvjax.pipeline.text import in_minutes
from kvjax.pipeline.train import runs_are_trained
from kvjax.pipeline.train_apart import TrainingGroup, train_apart
from kvjax.report.factor_charts import factor_charts
from kvjax.report.factor_page import factor_page
from kvjax.report.text import say
from kvjax.sweeps.settings import SweepSettings
from kvjax.task.benchmark import Benchmark
from kvjax.task.probe_set import own_probe_set
from kvjax.units.unit import IN_PROCESS, Engine, Unit

_COMMON_STEPS = CompareSettings(align="intersection")


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of a screen: what it is called, whether it is current, and what does the rest of it."""

    name: str
    current: Callable[[], Current]
    run: Callable[[Progress], object]


def run_screen(
    plan: ScreenPlan, progress: Progress = no_progress, engine: Engine = IN_PROCESS
) -> list[ComparisonLayout]:
    """Runs what is left of a screen, with a printed line per part, and returns where the comparisons are.

    Args:
      plan: the screen.
      progress: shows how far a part is.
      engine: what does units of work, such as a run's sweep.

    Raises:
      InputError: a folder holds another study, or a stage refuses; what earlier parts wrote stays.
    """
    parts = list(_parts(plan, engine))
    began = time.monotonic()
    for number, part in enumerate(parts, start=1):
        label, started, state = f"{number}/{len(parts)}  {part.name}", time.monotonic(), part.current()
        if state.holds:
            say(f"{label}: current, skipped")
            continue
        part.run(progress)
        say(f"{label}: done in {in_minutes(time.monotonic() - started)}")
    say(f"\nThe screen took {in_minutes(time.monotonic() - began)}.")
    return [plan.layout.factor(name) for name in plan.varied]


def _parts(plan: ScreenPlan, engine: Engine) -> Iterator[_Part]:
    """Lists what a screen consists of: benchmarks, training by program, the stages over all runs, comparisons."""
    for setting in plan.settings:
        if setting is plan.base or setting.benchmark_dir != plan.base.benchmark_dir:
            yield _of_stage(GENERATE, plan, [setting])
    if engine.spreads:
        yield _Part(TRAIN.name, lambda: runs_are_trained(plan.runs), lambda progress: _train(plan, engine, progress))
    else:
        for settings in plan.programs:
            yield _of_stage(TRAIN, plan, settings)
    for stage in (PROBE_SET, SWEEP, WINDOWS, EVALUATE):
        yield _over_measured_runs(stage, plan, engine)
    for setting in plan.settings:
        if setting.benchmark_dir != plan.base.benchmark_dir:
            yield _Part(
                f"sweep on the base's probe set, {setting.name}",
                lambda one=setting: _measured_on_base(plan, one),
                lambda progress, one=setting: _sweep_on_base(plan, one, progress, engine),
            )
    yield _Part(
        "compare the seeds of every setting",
        lambda: all_current(_seeds_are_compared(plan, setting) for setting in plan.settings),
        lambda progress: _compare_seeds(plan, progress, engine),
    )
    for name in plan.varied:
        yield _Part(
            f"compare {name}",
            lambda factor=name: _factor_is_current(plan, factor),
            lambda progress, factor=name: compare_factor(plan, factor),
        )


def _of_stage(stage: Stage, plan: ScreenPlan, settings: Sequence[PlannedSetting]) -> _Part:
    """Does a stage for settings that share a benchmark."""
    study = _study(plan, settings[0], _runs_of(settings), IN_PROCESS)
    return _Part(
        f"{stage.name}, {', '.join(setting.name for setting in settings)}",
        lambda: stage.current(study),
        lambda progress: stage.run(study, progress),
    )


def _train(plan: ScreenPlan, engine: Engine, progress: Progress) -> None:
    """Trains all programs of a screen at once."""
    groups = [TrainingGroup(_runs_of(settings), settings[0].benchmark_dir) for settings in plan.programs]
    train_apart(groups, engine, progress)


def _runs_of(settings: Sequence[PlannedSetting]) -> dict[Path, TrainConfig]:
    return {path: config for setting in settings for path, config in setting.runs.items()}


def _over_measured_runs(stage: Stage, plan: ScreenPlan, engine: Engine) -> _Part:
    """Lifts a stage to all runs of a screen that saved a checkpoint, whatever they were trained on."""

    study = _study(plan, plan.base, plan.runs, engine)
    return _Part(
        stage.name,
        lambda: stage.current(study.measurable()),
        lambda progress: stage.run(study.measured(), progress),
    )


def _study(plan: ScreenPlan, setting: PlannedSetting, runs: Mapping[Path, TrainConfig], engine: Engine) -> Study:
    folder = plan.layout.comparison(setting.name).path
    places = {"ranking": folder / "ranking.json", "comparison": folder, "report": folder / "report.html"}
    return Study(setting.benchmark_dir, setting.benchmark, runs, **places, engine=engine)


def _swept(setting: PlannedSetting) -> list[RunDir]:
    runs = [RunDir.open(path) for path in setting.runs]
    return [run for run in runs if run.checkpoints]


def _on_base(plan: ScreenPlan, setting: PlannedSetting) -> list[RunDir]:
    places = [plan.layout.on_base(setting.name) / run.path.name for run in _swept(setting)]
    return [RunDir.open(place) for place in places if RunLayout(place).source_run.is_file()]


def _measured_on_base(plan: ScreenPlan, setting: PlannedSetting) -> Current:
    if plan.base.benchmark.num_keys != setting.benchmark.num_keys or (
        plan.base.benchmark.num_values != setting.benchmark.num_values
    ):
        return Current(True, "it has another vocabulary than the base's data")
    runs, swept = _on_base(plan, setting), _swept(setting)
    if not swept:
        return Current(True, "no run of it saved a checkpoint")
    if len(runs) < len(swept):
        return Current(False, f"{plan.layout.on_base(setting.name)} lacks runs")
    return all_current(sweep_is_current(run, plan.base.benchmark_dir) for run in runs)


def _sweep_on_base(plan: ScreenPlan, setting: PlannedSetting, progress: Progress, engine: Engine) -> None:
    probe = own_probe_set(plan.layout.base_probe_set, Benchmark.open(plan.base.benchmark_dir))
    runs, folder = [run.path for run in _swept(setting)], plan.layout.on_base(setting.name)
    if len(runs) == 1:  # a command puts the results of one run into the folder itself; other seeds may come
        folder /= runs[0].name
    sweep_over_runs(
        dataclasses.replace(RunsOnBenchmark.of(runs), benchmark_dir=str(plan.base.benchmark_dir)),
        SweepInputs(probe_set=str(probe.path)),
        SweepSettings(contradiction="note"),
        progress,
        ResultSettings(output_dir=str(folder)),
        engine,
    )


def _seeds_are_compared(plan: ScreenPlan, setting: PlannedSetting) -> Current:
    runs = _swept(setting)
    if len(runs) < FEWEST_RUNS:
        return Current(True, "fewer than two runs to compare")
    return comparison_is_current(runs, plan.layout.comparison(setting.name).path)


def _compare_seeds(plan: ScreenPlan, progress: Progress, engine: Engine) -> None:
    left = [setting for setting in plan.settings if not _seeds_are_compared(plan, setting).holds]
    units = []
    for setting in left:
        folder = str(plan.layout.comparison(setting.name).path)
        runs = Runs.of([run.path for run in _swept(setting)])
        units.append(Unit("comparison", folder, _write_comparison, (runs, ComparisonOutput(output_dir=folder))))
    with progress(len(units), "settings") as advance:
        engine.run(units, advance)


def _write_comparison(runs: Runs, output: ComparisonOutput) -> None:
    compare_seeds(runs, _COMMON_STEPS, output)


def _settings_of(plan: ScreenPlan, name: str) -> list[Setting]:
    return [_setting(plan, label, setting) for label, setting in plan.compared(name).items()]


def _setting(plan: ScreenPlan, label: str, setting: PlannedSetting) -> Setting:
    on_base = {RunResults(run).run.layout.path.resolve(): run for run in _on_base(plan, setting)}
    runs = []
    for path, config in setting.runs.items():
        opened, name = RunDir.open(path), f"{label}_seed_{config.seed}"
        swept = SweptRun(name, RunResults(opened)) if opened.checkpoints else None
        other = on_base.get(path.resolve())
        runs.append(
            ScreenedRun(
                name=name,
                path=str(path),
                seed=config.seed,
                diverged_at=opened.diverged_at,
                swept=swept,
                on_base=None if other is None else SweptRun(name, RunResults(other)),
                full_splits={} if swept is None else _full_splits(opened),
            )
        )
    layout = plan.layout.comparison(setting.name)
    seeds = (read_json(layout.comparison), str(layout.path)) if layout.comparison.is_file() else None
    return Setting(label, setting.overrides, runs, seeds)


def _full_splits(run: RunDir) -> dict[str, float]:
    path = run.layout.evaluation("best")
    document = read_json(path) if path.is_file() else {"splits": {}}
    return {split: one["answer_accuracy"] for split, one in document["splits"].items()}


def compare_factor(plan: ScreenPlan, name: str) -> dict[str, Any]:
    """Compares the settings of one factor and writes `factor.json`, `.nc`, `.md` and figures, the JSON last.

    Raises:
      InputError: a run lacks a result, or a file cannot be written.
    """
    return write_factor_comparison(plan.layout.factor(name), plan.screen.name, name, _settings_of(plan, name))


def write_factor_comparison(
    layout: ComparisonLayout, screen: str, factor: str, settings: Sequence[Setting]
) -> dict[str, Any]:
    """Compares settings of a factor, the base first, and writes the files.

    Args:
      layout: where they go.
      screen, factor: names.
      settings: the settings with their runs.

    Raises:
      InputError: as `compare_factor`.
    """
    trajectories = {one.label: align(one.swept, _COMMON_STEPS.align).dataset for one in settings if one.swept}
    document = {
        "schema_version": SCHEMA_VERSION,
        "screen": screen,
        "factor": factor,
        "base_label": settings[0].label,
        **compare_settings(settings),
        "versions": software_versions(),
    }
    document["findings"] = factor_findings(document)
    root = xr.Dataset(attrs={"factor": factor, "settings": ", ".join(trajectories)})
    write_comparison_files(
        layout,
        document,
        groups=[(None, root), *trajectories.items()],
        charts=factor_charts(document, trajectories),
        page=factor_page(document),
        write=write_factor,
    )
    return document


def _factor_is_current(plan: ScreenPlan, name: str) -> Current:
    layout = plan.layout.factor(name)
    path = layout.comparison
    if not path.is_file():
        return Current(False, f"{path} does not exist")
    try:
        found = read_factor(path)
        check_comparison_files(layout, found.arrays, found.files, remedy="run kvjax factor-screen again")
        then = [(run.path, run.sweep_sha256, run.story_sha256) for entry in found.settings for run in entry.runs]
        now = [(run.path, *_made_from(run)) for setting in _settings_of(plan, name) for run in setting.runs]
    except InputError as error:
        return Current(False, str(error))
    return Current(then == now, f"{path} compares {len(then)} runs, as they are measured now or were before")


def _made_from(run: ScreenedRun) -> tuple[str | None, str | None]:
    return (None, None) if run.swept is None else run.swept.made_from


def print_screen(layouts: Sequence[ComparisonLayout]) -> None:
    """Prints what every factor changed, and where its page is."""
    for layout in layouts:
        found = read_factor(layout.comparison)
        say(f"\n{found.factor}: {', '.join(entry.label for entry in found.settings)}")
        for sentence in found.findings:
            say(f"  - {sentence}")
        say(f"  {layout.page}")
