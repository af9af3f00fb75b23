"""Trains runs on a cluster: groups of them as units of work, each on a worker as one program."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from kvjax.config.train import TrainConfig
from kvjax.pipeline.progress import Progress
from kvjax.pipeline.train import train_missing_runs
from kvjax.task.benchmark import Benchmark
from kvjax.units.unit import Engine, Unit


@dataclasses.dataclass(frozen=True)
class TrainingGroup:
    """Runs that can be trained as one program.

    Attributes:
      runs: run directory -> config; the configs have one `shared_settings`.
      benchmark_dir: what they are trained on.
    """

    runs: Mapping[Path, TrainConfig]
    benchmark_dir: Path

    def parts(self, number: int) -> Iterator[TrainingGroup]:
        """Divides the group into at most so many, of about equal size."""
        paths = list(self.runs)
        size = math.ceil(len(paths) / number)
        for start in range(0, len(paths), size):
            yield TrainingGroup({path: self.runs[path] for path in paths[start : start + size]}, self.benchmark_dir)


def train_missing(group: TrainingGroup) -> None:
    """Trains the runs of a group that are not trained yet; begun ones go on."""
    train_missing_runs(group.runs, Benchmark.open(group.benchmark_dir), advance=lambda steps: None)


def train_apart(
    groups: Sequence[TrainingGroup],
    engine: Engine,
    progress: Progress,
    train: Callable[[TrainingGroup], None] = train_missing,
) -> None:
    """Trains groups, each in as many parts as its share of the workers; without any, run by run.

    A worker that dies costs what its runs trained since their last checkpoint.

    Args:
      groups: the runs.
      engine: where they are trained.
      progress: shows how far it is.
      train: what is done with a part; by default, what is not trained yet is trained.

    Raises:
      InputError: a run directory holds a run of another config, or a part cannot be trained. The others are.
    """
    workers, total = engine.workers(), sum(len(group.runs) for group in groups)
    units = []
    for group in groups:
        share = math.ceil(len(group.runs) * workers / total)
        units += [_unit(part, train) for part in group.parts(share or len(group.runs))]
    with progress(len(units), "groups of runs") as advance:
        engine.run(units, advance)


def _unit(group: TrainingGroup, train: Callable[[TrainingGroup], None]) -> Unit:
    first, *others = map(str, group.runs)
    return Unit("training", f"{first} and {len(others)} more" if others else first, train, (group,))
