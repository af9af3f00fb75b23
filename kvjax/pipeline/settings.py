"""What the stages of a study take, field by field; the command line makes its flags from these."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from kvjax.config.settings import Settings, required, setting
from kvjax.errors import bad_argument
from kvjax.sweeps.settings import SweepSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runs(Settings):
    """Run directories."""

    run_dirs: tuple[str, ...] = required(
        "Run directories, or folders of their results: a comma list, globs allowed; may be repeated.", repeated=True
    )

    @classmethod
    def of(cls, paths: Iterable[Path]) -> Self:
        """Names existing directories, whatever characters they have."""
        return cls(run_dirs=tuple(map(str, paths)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunsOnBenchmark(Runs):
    """Run directories, and the benchmark they were trained on."""

    benchmark_dir: str | None = setting(
        None, "The runs' benchmark; by default the one each run's config records, or that it was swept on."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResultSettings(Settings):
    """How results of runs are written."""

    output_dir: str | None = setting(
        None,
        "Where results go instead of the run directory; for several runs, a folder in it each. Afterwards, name that "
        "in place of the run.",
    )
    wait: bool = setting(False, "Wait while another command writes results of a run, instead of being refused.")


DEFAULT_RESULTS = ResultSettings()

_MOST_PROCESSES = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Display(Settings):
    """What is shown while a command works."""

    progress: bool = setting(True, "Show progress bars with the time left.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runtime(Settings):
    """How JAX runs."""

    compilation_cache: bool = setting(
        True, "Keep compiled programs in a private per-user folder, so that the next start is faster."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkplaceSettings(Settings):
    """Where units of work run."""

    scheduler: str | None = setting(
        None,
        "Dask scheduler on whose workers to work, a run each, or a group of runs that train: its address "
        "(tcp://host:8786) or the file that it wrote; by default all is done in this process.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessSettings(Settings):
    """Which processes share the checkpoints of a run."""

    processes: str = setting(
        "1",
        "Processes that share the checkpoints of each run: how many to start on this machine, or auto if each is "
        "started with this command, by srun, mpirun or another launcher that JAX detects.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.processes != "auto" and not (self.processes.isdecimal() and 0 < int(self.processes) <= _MOST_PROCESSES):
            raise bad_argument("processes", f"auto or a number from 1 to {_MOST_PROCESSES}", self.processes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateSettings(Settings):
    """A benchmark to draw."""

    config: str = required("Benchmark config: a JSON file, or the name of a shipped one, such as symbolic_kv_base.")
    output_dir: str | None = setting(None, "Where to write the benchmark; by default the config's output_dir.")
    overwrite: bool = setting(False, "Replace an existing benchmark, once the new one is whole.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings(Settings):
    """Seeds to train."""

    config: str = required("Training config: a JSON file, or the name of a shipped one.")
    seeds: tuple[int, ...] | None = setting(
        None, "Seeds, such as 7,11,13; by default the config's own, in output_dir itself."
    )
    benchmark_dir: str | None = setting(None, "The benchmark; by default the config's.")
    output_dir: str | None = setting(None, "Where runs go; by default the config's output_dir.")
    resume: bool = setting(False, "Go on from the latest checkpoint that every run has which did not diverge.")
    overwrite: bool = setting(
        False, "Replace what training wrote in existing run directories, and their analysis; other files stay."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertSettings(Settings):
    """A conversion, and how to verify it."""

    to: str = setting("flax", "What to convert to.", choices=("flax", "torch"))
    verify: str = setting(
        "sample",
        "How to check: parity with PyTorch on 16 sequences, on the whole validation split, also the accuracies the run "
        "recorded in metrics.jsonl, or not at all. To torch, anything but none reads every file back.",
        choices=("sample", "all", "metrics", "none"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Settings):
    """A checkpoint of each run, and the splits to evaluate it on."""

    checkpoint: str = setting("best", "Which checkpoint: best, final or a step.")
    splits: tuple[str, ...] | None = setting(None, "Splits to evaluate on; by default all but train.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectSettings(Settings):
    """Which runs are eligible as the reference, and where the ranking goes."""

    min_validation_answer_accuracy: float = setting(
        0.9, "Validation answer accuracy a run needs to be eligible.", minimum=0.0, maximum=1.0
    )
    output: str | None = setting(None, "JSON file for the ranking; by default it is only printed.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonOutput(Settings):
    """Where a comparison goes."""

    output_dir: str = required("Folder for comparison.json, comparison.nc, comparison.md and figures.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeSetSettings(Settings):
    """A probe set to choose."""

    benchmark_dir: str = required("The benchmark to choose from.")
    output: str = required("The probe set to write, ending in .jsonl; its companions go beside it.")
    examples_per_split: int = setting(96, "Probe records per split.", minimum=1)
    fit_examples: int = setting(512, "Records of the fit set, from the train split.", minimum=1)
    seed: int = setting(17, "Seed of the choice.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepInputs(Settings):
    """What a sweep measures: probe set, checkpoints and the reference among them."""

    probe_set: str | None = setting(
        None, "Probe set to measure on; by default analysis/probe_set.jsonl, made if absent."
    )
    steps: str = setting("all", "Checkpoints to measure: all, or steps and ranges such as 250,1000-4000.")
    reference: str = setting("final", "Checkpoint that drift is also measured to: final, best or a step.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FollowSettings(Settings):
    """Whether a sweep goes on while its runs train."""

    follow: bool = setting(
        False,
        "Go on while the runs still train: look for new checkpoints twice a minute, until every run is complete. Waits "
        "for runs that have not begun.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowSettings(Settings):
    """How birth windows are looked for."""

    config: str = setting("default", "Window config, shipped or a JSON file.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown(Settings):
    """How much of each window is printed."""

    show: int = setting(6, "Triggers, metrics and components printed per window.", minimum=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairSource(Settings):
    """What interventions make their pairs from."""

    probe_set: str | None = setting(
        None, "Probe set that pairs are made from; by default the run's own, analysis/probe_set.jsonl."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatusSettings(Settings):
    """What `status` demands and prints."""

    require: bool = setting(False, "Fail with status 2 unless every run meets every condition.")
    reasons: bool = setting(True, "Print why each condition holds or fails.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifySettings(Settings):
    """How much `verify` measures again."""

    sample: int = setting(
        3, "Checkpoints of each run, and interventions, that are measured again; 0 compares hashes only.", minimum=0
    )
    seed: int = setting(0, "Seed of the choice of these.")
    comparison_dirs: tuple[str, ...] | None = setting(
        None, "Comparisons to verify as well, such as seeds/*/*; globs allowed; may be repeated.", repeated=True
    )
    factor_dirs: tuple[str, ...] | None = setting(
        None, "Factors of a screen to verify as well, such as screen/factors/*; may be repeated.", repeated=True
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartSettings(Settings):
    """A small study from nothing."""

    output_dir: str = setting("quickstart", "Where everything goes.")
    benchmark_config: str = setting("symbolic_kv_quickstart", "Benchmark config, shipped or a JSON file.")
    train_config: str = setting("symbolic_kv_quickstart", "Training config, shipped or a JSON file.")
    seeds: tuple[int, ...] = setting((7, 11), "Seeds to train.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineSettings(Settings):
    """A study from a config, or of runs that exist."""

    config: str = setting("symbolic_kv_quickstart", "Training config, shipped or a JSON file.")
    run_dirs: tuple[str, ...] | None = setting(
        None,
        "Runs that exist, instead of a config: a comma list, globs allowed; may be repeated.",
        repeated=True,
    )
    benchmark_config: str | None = setting(
        None, "Benchmark config; by default the shipped one of the training config's name."
    )
    seeds: tuple[int, ...] | None = setting(None, "Seeds to train, such as 7,11,13; by default the config's own.")
    output_dir: str = setting("study", "Where benchmark, runs and comparison go.")
    pairs_per_kind: int | None = setting(
        None, "Pairs of each kind that interventions use; by default all 96.", minimum=2
    )


def check_logistic_steps(inputs: SweepInputs, settings: SweepSettings) -> None:
    """Refuses logistic probes at every checkpoint.

    Raises:
      InputError: logistic probes are asked for, and no steps are named.
    """
    if settings.probe == "logistic" and inputs.steps == "all":
        expected = "steps to fit logistic probes at (`steps`), for they take far longer than ridge"
        raise bad_argument("probe", expected, "`steps=all`")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportSettings(RunsOnBenchmark):
    """What a report shows, and where it goes."""

    comparison_dir: str | None = setting(
        None, "Comparison of these runs, as compare-seeds wrote it; by default several runs are compared anew."
    )
    factor_dirs: tuple[str, ...] | None = setting(
        None,
        "Factors of a screen around these runs, such as screen/factors/*; may be repeated.",
        repeated=True,
    )
    output: str | None = setting(
        None, "The HTML file; by default analysis/report.html of a single run, else report.html."
    )
    figures_dir: str | None = setting(None, "Folder for every chart as PNG and SVG, for papers.")
    heads: tuple[str, ...] | None = setting(
        None, "Heads whose attention is shown, such as L0H3,L1H2; by default those whose ablation costs most."
    )
    steps: str | None = setting(
        None,
        "Steps whose attention is shown: all, or steps and ranges such as 250,1000-4000; by default up to eight, those "
        "at which most changes.",
    )
    example: int = setting(0, "Stream of the probe set whose attention is shown, counted from 0.", minimum=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactorSettings(Settings):
    """A factor screen."""

    config: str = required("Factor config: a JSON file, or the name of a shipped one, such as quick.")
    seeds: tuple[int, ...] | None = setting(None, "Seeds of every setting; by default the config's.")
    output_dir: str | None = setting(None, "Where benchmarks, runs and comparisons go; by default the config's.")
    dry_run: bool = setting(False, "Print the runs, and about what time and disk they take; start nothing.")
