"""A small study from nothing: some of the stages in a row, and figures."""

from __future__ import annotations

import dataclasses
import glob
from pathlib import Path

from kvjax.artifacts.results import RunResults
from kvjax.config.benchmark import BenchmarkConfig
from kvjax.config.files import find_config, read_config
from kvjax.config.train import TrainConfig
from kvjax.pipeline.progress import Progress, no_progress
from kvjax.pipeline.report import WrittenReport
from kvjax.pipeline.settings import QuickstartSettings
from kvjax.pipeline.stages import GENERATE, REPORT, SWEEP, TRAIN, WINDOWS, Study
from kvjax.pipeline.text import print_told_windows
from kvjax.pipeline.train import run_directories
from kvjax.report.figures import head_ablation_figure, save_figure, trajectory_figure
from kvjax.report.text import print_sweep_reports, say
from kvjax.sweeps.results import SweepReport
from kvjax.units.unit import IN_PROCESS, Engine

_SHOWN = 8


def quickstart(
    settings: QuickstartSettings, progress: Progress = no_progress, engine: Engine = IN_PROCESS
) -> WrittenReport:
    """Draws a benchmark, trains seeds, measures every checkpoint, looks for birth windows, makes figures and a page.

    Prints what it does. What is there already is not made again.

    Returns:
      Where the page is.

    Raises:
      InputError: a config cannot be used, the output directory holds a study of other configs, or no run saved a
        checkpoint.
    """
    output, study = Path(settings.output_dir), dataclasses.replace(study_of(settings), engine=engine)
    drawn = study.benchmark_config
    if not study.benchmark_dir.exists():
        say(f"1/6  drawing the benchmark: {drawn.num_keys} keys, {drawn.num_values} values")
    GENERATE.run(study, progress)
    steps = next(iter(study.runs.values())).num_steps
    together = "" if engine.spreads else ", as one program"
    say(f"2/6  training {len(study.runs)} seeds, {steps} steps each{together}")
    TRAIN.run(study, progress)
    study = study.measured()
    say("3/6  measuring every checkpoint: behaviour, logit lens, attention, every head and MLP ablated")
    reports = SWEEP.run(study, progress)
    print_sweep_reports(reports)
    say("\n4/6  drawing figures")
    for files in draw_figures(reports, output / "figures"):
        say("     " + ", ".join(map(str, files)))
    say(f"     Look at {output / 'figures' / 'trajectories.png'} first.")
    say("\n5/6  looking for birth windows")
    print_told_windows(WINDOWS.run(study, progress), show=_SHOWN)
    say("\n6/6  putting everything into one page")
    return REPORT.run(study, progress)


def study_of(settings: QuickstartSettings) -> Study:
    """Says where the parts of a quickstart's study lie, and what they are made from.

    Raises:
      InputError: a config cannot be used.
    """
    output = Path(settings.output_dir)
    benchmark = read_config(find_config(settings.benchmark_config, "benchmark"), BenchmarkConfig)
    config = read_config(find_config(settings.train_config, "train"), TrainConfig)
    config = config.model_copy(update={"benchmark_dir": str((output / "benchmark").resolve())})
    runs = run_directories(config, settings.seeds, str(output / "runs"))
    return Study(
        output / "benchmark", benchmark, runs, output / "ranking.json", output / "comparison", output / "report.html"
    )


def run_globs(settings: QuickstartSettings) -> list[str]:
    """Names the runs of a quickstart's study, as `run_dirs` takes them."""
    return [f"{glob.escape(settings.output_dir)}/runs/*"]


def draw_figures(reports: list[SweepReport], folder: Path) -> list[list[Path]]:
    """Draws the figures of swept runs and returns the files of each."""
    swept = [RunResults(report.run).metrics for report in reports]
    figures = {"trajectories": trajectory_figure(swept), "head_ablations": head_ablation_figure(swept)}
    return [save_figure(figure, folder, name) for name, figure in figures.items()]
