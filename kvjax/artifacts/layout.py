"""Names every file and folder of a run, a probe set and a benchmark, once (docs/formats.md describes them)."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

PROBE_SET_FILE = "probe_set.jsonl"  # of a run's own; another may have any name


@dataclasses.dataclass(frozen=True)
class RunLayout:
    """The files of a run directory. Everything outside `analysis` is the trainer's.

    Attributes:
      path: the run directory.
      results: the folder that holds `analysis`; None for the run directory.
    """

    path: Path
    results: Path | None = None

    @property
    def config(self) -> Path:
        """The config that the run was trained with."""
        return self.path / "run_config.json"

    @property
    def metrics(self) -> Path:
        """Rows that the trainer logged."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """Written by the trainer once the run is finished."""
        return self.path / "summary.json"

    @property
    def best_record(self) -> Path:
        """Which checkpoint is the best, and by which metric."""
        return self.path / "best_checkpoint.json"

    @property
    def source_run(self) -> Path:
        """In a folder of results: which run directory they belong to."""
        return (self.results or self.path) / "source_run.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """The best checkpoint so far."""
        return self.checkpoints / "best.pt"

    @property
    def last(self) -> Path:
        """The last checkpoint of a run that keeps no step checkpoints."""
        return self.checkpoints / "last.pt"

    def step_checkpoint(self, step: int) -> Path:
        """Names the file to which this project's trainer writes the checkpoint of a step."""
        return self.checkpoints / f"{step_name(step)}.pt"

    def step_checkpoints(self) -> list[tuple[int, Path]]:
        """Lists (step, file) of the step checkpoints that exist, whatever the number of digits in their names."""
        found = [(step_of(file), file) for file in self.checkpoints.glob("step_*.pt")]
        return [(step, file) for step, file in found if step is not None]

    @property
    def analysis(self) -> Path:
        """The folder of everything measured on the run."""
        return (self.results or self.path) / "analysis"

    @property
    def analysis_lock(self) -> Path:
        """The file whose lock a command holds while it writes the analysis folder."""
        return self.analysis / "lock"

    @property
    def training_lock(self) -> Path:
        """The file, beside the run directory, whose lock training holds: the directory itself may be replaced."""
        path = self.path.resolve()
        return path.parent / f".{path.name}.lock"

    @property
    def probe_set(self) -> Path:
        """The run's own probe set; `ProbeSetLayout` names its other files."""
        return self.analysis / PROBE_SET_FILE

    @property
    def measured(self) -> Path:
        """The folder of measured sums, one file per checkpoint."""
        return self.analysis / "measured"

    @property
    def sweep(self) -> Path:
        """The provenance of a sweep, and the hashes of its tables."""
        return self.analysis / "sweep.json"

    @property
    def rows(self) -> Path:
        """One row per checkpoint."""
        return self.analysis / "checkpoint_metrics.jsonl"

    @property
    def arrays(self) -> Path:
        """Every mean, its interval, and the events behind them, labelled."""
        return self.analysis / "checkpoint_metrics.nc"

    @property
    def heads(self) -> Path:
        """One row per checkpoint and head."""
        return self.analysis / "component_candidates" / "heads.jsonl"

    @property
    def mlps(self) -> Path:
        """One row per checkpoint and MLP."""
        return self.analysis / "component_candidates" / "mlps.jsonl"

    @property
    def neurons(self) -> Path:
        """One row per checkpoint and neuron, from interventions."""
        return self.analysis / "component_candidates" / "neurons.jsonl"

    @property
    def birth_windows(self) -> Path:
        """Births, birth windows and their components."""
        return self.analysis / "birth_windows.json"

    @property
    def story(self) -> Path:
        """What happened in the run, as phases and handovers."""
        return self.analysis / "story.json"

    @property
    def story_text(self) -> Path:
        """The same in words."""
        return self.analysis / "story.md"

    @property
    def report(self) -> Path:
        """Everything measured on the run, as a page to look at."""
        return self.analysis / "report.html"

    @property
    def interventions(self) -> Path:
        """The folder of interventions, one folder per kind."""
        return self.analysis / "interventions"

    @property
    def component_recovery(self) -> Path:
        """What patching recovered by component and step, as text; a table to load, `.csv`, lies beside it."""
        return self.interventions / "component_recovery.md"

    @property
    def importance(self) -> Path:
        """What ablating each component costs beside what patching it recovers."""
        return self.interventions / "importance.json"

    def intervention(self, kind: str, window: str) -> Path:
        """Names the summary of one kind of intervention in one window; `arrays_beside` names its numbers."""
        return self.interventions / kind / f"{window}.json"

    @property
    def converted(self) -> Path:
        """The folder of the parameter store."""
        return self.analysis / "converted"

    @property
    def exported_torch(self) -> Path:
        """The folder of `.pt` files written from stored parameters."""
        return self.analysis / "exported_torch"

    def evaluation(self, checkpoint: str) -> Path:
        """Names the full-split evaluation of a checkpoint (`best`, `final` or a step)."""
        return self.analysis / "evaluation" / f"{checkpoint}.json"


@dataclasses.dataclass(frozen=True)
class ComparisonLayout:
    """The files of a comparison of runs, or of a factor's values.

    Attributes:
      path: the folder they are in.
      stem: of their names.
    """

    path: Path
    stem: str = "comparison"

    @property
    def comparison(self) -> Path:
        """What was found, and on which runs."""
        return self.path / f"{self.stem}.json"

    @property
    def arrays(self) -> Path:
        """Every measure of every run at common steps; of seeds, the roles of heads too."""
        return self.path / f"{self.stem}.nc"

    @property
    def page(self) -> Path:
        """The finding in words, with tables."""
        return self.path / f"{self.stem}.md"

    @property
    def figures(self) -> Path:
        """The folder of figures."""
        return self.path / "figures"


@dataclasses.dataclass(frozen=True)
class ScreenLayout:
    """The folders and files of a factor screen.

    Attributes:
      path: the folder they are in.
    """

    path: Path

    @property
    def benchmarks(self) -> Path:
        """The folder of benchmarks: the base's, and one per value of a factor that changes the data."""
        return self.path / "benchmarks"

    @property
    def runs(self) -> Path:
        """The folder of runs, by factor and value."""
        return self.path / "runs"

    @property
    def base_probe_set(self) -> Path:
        """The probe set on which runs of other data are measured too."""
        return self.path / "base_probe_set.jsonl"

    def benchmark(self, setting: str) -> Path:
        """Names the benchmark of a setting, `base` or `factor/value`."""
        return self.benchmarks / setting

    def on_base(self, setting: str) -> Path:
        """Names the folder of a setting's results on the base's probe set."""
        return self.path / "on_base_probe_set" / setting

    def comparison(self, setting: str) -> ComparisonLayout:
        """Names the comparison of a setting's seeds."""
        return ComparisonLayout(self.path / "seeds" / setting)

    def factor(self, name: str) -> ComparisonLayout:
        """Names the comparison of a factor's values."""
        return ComparisonLayout(self.path / "factors" / name, "factor")


@dataclasses.dataclass(frozen=True)
class ProbeSetLayout:
    """The files of a probe set, which share a stem.

    Attributes:
      records: the probe records, `<stem>.jsonl`.
    """

    records: Path

    @property
    def manifest(self) -> Path:
        """The probe set's manifest, or the metadata that the reference tool wrote."""
        return self.records.with_suffix(".metadata.json")

    @property
    def companion(self) -> Path:
        """The manifest of a probe set that the reference tool wrote."""
        return self.records.with_suffix(".companion.json")

    @property
    def fit(self) -> Path:
        """The fit set."""
        return self.records.with_suffix(".fit.jsonl")

    @property
    def sources(self) -> Path:
        """The source record of every counterfactual record."""
        return self.records.with_suffix(".sources.jsonl")

    @property
    def pairs(self) -> Path:
        """The pairs of streams made from the probe set."""
        return self.records.with_suffix(".pairs.jsonl")

    @property
    def pairs_manifest(self) -> Path:
        """The manifest of these pairs."""
        return self.records.with_suffix(".pairs.metadata.json")


@dataclasses.dataclass(frozen=True)
class BenchmarkLayout:
    """The files of a benchmark directory.

    Attributes:
      path: the directory.
    """

    path: Path

    @property
    def metadata(self) -> Path:
        """Vocabulary, splits, diagnostics and config."""
        return self.path / "metadata.json"

    def split(self, name: str) -> Path:
        """Names the records of a split."""
        return self.path / f"{name}.jsonl"


def arrays_beside(summary: Path) -> Path:
    """Names the netCDF file with every number of an intervention's summary."""
    return summary.with_suffix(".nc")


def step_name(step: int) -> str:
    """Names a step's checkpoint and its measured sums."""
    return f"step_{step:06d}"


def step_named(name: str) -> int:
    """Parses the step from a name that `step_name` formed."""
    return int(name.rpartition("_")[2])


def step_of(file: Path) -> int | None:
    """Parses the step from a checkpoint file's name; None if the name has no step."""
    match = re.fullmatch(r"step_(\d+)\.pt", file.name)
    return int(match[1]) if match else None
