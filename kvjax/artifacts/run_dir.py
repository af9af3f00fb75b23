"""Open training runs: find their checkpoints, their benchmark and the steps that a person names."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from kvjax.artifacts.benchmark_hash import BenchmarkHashes
from kvjax.artifacts.files import file_sha256, read_json
from kvjax.artifacts.layout import BenchmarkLayout, RunLayout
from kvjax.artifacts.source_run import layout_of
from kvjax.artifacts.sweep_schema import read_sweep
from kvjax.artifacts.training_log import TrainingLog, whole_number
from kvjax.config.files import read_config
from kvjax.config.run import RunConfig
from kvjax.errors import InputError, bad_argument, note, unusable


@dataclasses.dataclass(frozen=True)
class RunDir:
    """A run directory, opened.

    Attributes:
      path: the directory that was named: the run's, or one with its results (`source_run.json`).
      layout: the names of all its files.
      config: the part of `run_config.json` that an analysis reads.
      checkpoints: step -> checkpoint file, in step order.
    """

    path: Path
    layout: RunLayout
    config: RunConfig
    checkpoints: Mapping[int, Path]

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """Opens the run in a directory, or the one whose results are there.

        Raises:
          InputError: there is no run, its config cannot be read, or two different files are of one step.
        """
        if not path.is_dir():
            raise unusable(path, "a run directory", _what_is(path))
        layout = layout_of(path)
        config = read_config(layout.config, RunConfig, recorded=True)
        return cls(path, layout, config, _step_checkpoints(layout))

    @property
    def analysis(self) -> Path:
        """The folder of everything measured on this run."""
        return self.layout.analysis

    @functools.cached_property
    def planned_steps(self) -> int:
        """The last step that is planned: the config's, or that of the latest resume if it is later.

        A trainer that resumes a run for longer may leave the config as it was.
        """
        try:
            resumed = self.log.planned_steps
        except InputError:
            resumed = None  # a damaged log is refused where its rows are used
        return max(self.config.num_steps, resumed or 0)

    @property
    def complete(self) -> bool:
        """Checks whether the checkpoint of the run's last planned step exists.

        If the last step is no multiple of `checkpoint_every_steps`, the run also counts as complete once its last
        periodic checkpoint and `summary.json` exist. A run that diverged has no more to come.
        """
        every, end = self.config.checkpoint_every_steps, self.planned_steps
        reached = max(self.checkpoints, default=-1)
        ended = reached >= end or (reached >= end // every * every and self.layout.summary.is_file())
        return ended or self.diverged_at is not None

    @property
    def diverged_at(self) -> int | None:
        """The step at which loss or gradient stopped being finite, as the trainer recorded it; None if neither did."""
        if not self.layout.summary.is_file():
            return None
        try:
            return whole_number(read_json(self.layout.summary).get("diverged_at_step"))
        except (InputError, AttributeError):
            return None  # of another trainer, or damaged; checkpoints say how far the run came

    def benchmark_dir(self, override: str | None = None) -> Path:
        """Finds the run's benchmark.

        Tries the override; then the path in the run's config, from here and from the run; then the benchmark of the
        run's sweep, if it has not changed.

        Raises:
          InputError: none of them exists.
        """
        if override:
            return Path(override)
        recorded = Path(self.config.benchmark_dir)
        for base in (Path(), self.layout.path, *self.layout.path.resolve().parents):
            if os.path.isfile(BenchmarkLayout(base / recorded).metadata):  # also if no file can have the name
                return base / recorded
        if (swept_on := self._swept_benchmark()) is not None:
            return swept_on
        raise unusable(
            self.layout.config,
            "benchmark_dir to exist (or `benchmark_dir`)",
            f"{recorded}, which does not",
        )

    def _swept_benchmark(self) -> Path | None:
        """Finds the benchmark that the run's sweep names; None if there is none or it has changed."""
        try:
            named = read_sweep(self.layout.sweep).benchmark
            path = Path(named.path)
            return path if BenchmarkHashes.of(path).names(named.sha256) else None
        except InputError:
            return None

    def best_checkpoint(self) -> tuple[int, Path]:
        """Finds the step and file of the best checkpoint, in `checkpoints/` whatever folder was recorded."""
        record_path = self.layout.best_record
        record = read_json(record_path)
        try:
            step, name = whole_number(record["step"]), _name_in(record["path"])
        except (KeyError, TypeError) as error:
            raise unusable(record_path, "a best checkpoint with path and step", repr(error)) from None
        if step is None:
            raise unusable(record_path, "a step that is a whole number", record["step"])
        file = self.layout.checkpoints / name
        if not os.path.isfile(file):  # unlike Path's, it takes names that no file can have
            raise unusable(record_path, f"its checkpoint in {self.layout.checkpoints}", f"no {name}")
        return step, file

    @property
    def log(self) -> TrainingLog:
        """What training logged in `metrics.jsonl`; empty if the trainer wrote none."""
        path = self.layout.metrics
        try:
            found = path.stat()
        except OSError:
            return TrainingLog.read(path)
        return _read_log(path, (found.st_ino, found.st_size, found.st_mtime_ns))

    def checkpoint_named(self, name: str) -> tuple[int, Path]:
        """Finds the step and file of the checkpoint that `best`, `final` or a step number names.

        Raises:
          InputError: it is none of these, or there is no such checkpoint.
        """
        if name == "best":
            return self.best_checkpoint()
        if name != "final" and not name.isdecimal():
            raise bad_argument("checkpoint", "best, final or a step", name)
        step = max(self.select_steps("all")) if name == "final" else int(name)
        if step not in self.checkpoints:
            raise unusable(self.layout.checkpoints, f"a checkpoint for `checkpoint={name}`", self.describe_steps())
        return step, self.checkpoints[step]

    def select_steps(self, wanted: str | int | Sequence[int]) -> list[int]:
        """Selects checkpoint steps by `all`, by steps and ranges `a-b` with commas, or by numbers.

        Raises:
          InputError: the run has no step checkpoints, the flag cannot be read, or it names none of them.
        """
        if not self.checkpoints:
            raise unusable(self.layout.checkpoints, "checkpoints step_XXXXXX.pt", "none")
        if not isinstance(wanted, str):
            wanted = ",".join(str(step) for step in np.atleast_1d(wanted))
        if wanted == "all":
            return list(self.checkpoints)
        steps: set[int] = set()
        for part in wanted.split(","):
            match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
            if not match:
                raise bad_argument("steps", "all, or steps and ranges such as 250,1000-4000", wanted)
            first, last = int(match[1]), int(match[2] or match[1])
            inside = [step for step in self.checkpoints if first <= step <= last]
            if not inside:
                raise unusable(
                    self.layout.checkpoints,
                    f"a checkpoint for `steps={part.strip()}`",
                    self.describe_steps(),
                )
            steps.update(inside)
        return sorted(steps)

    def describe_steps(self) -> str:
        """Lists the checkpoint steps in words: all of up to eight, else their number and ends."""
        steps = list(self.checkpoints)
        if len(steps) <= 8:
            return "steps " + ", ".join(map(str, steps))
        return f"{len(steps)} steps from {steps[0]} to {steps[-1]}"


@functools.lru_cache(maxsize=2)  # a command goes from run to run, and the logs of a thousand are large
def _read_log(path: Path, state: tuple[int, ...]) -> TrainingLog:
    del state  # a log that has grown is read again
    return TrainingLog.read(path)


def _name_in(path: str) -> str:
    """Takes the file's name off a path that any system may have recorded, Windows included."""
    return PureWindowsPath(path).name if "\\" in path and "/" not in path else PurePosixPath(path).name


def _what_is(path: Path) -> str:
    """Says what stands in place of a directory."""
    if path.is_symlink() and not path.exists():
        return f"a link to {path.readlink()}, which does not exist"
    return "a file" if path.exists() else "none"


def _step_checkpoints(layout: RunLayout) -> dict[int, Path]:
    """Finds the checkpoint file of each step, in step order; of two equal files of a step, the usual name's.

    Raises:
      InputError: two files of one step, as `step_100.pt` and `step_000100.pt`, differ.
    """
    found: dict[int, Path] = {}
    for step, file in sorted(layout.step_checkpoints()):
        if step in found:
            usual = layout.step_checkpoint(step)
            first, second = sorted((found[step], file), key=lambda path: path != usual)
            if file_sha256(first) != file_sha256(second):
                expected = f"one checkpoint of step {step} (remove or rename the wrong one)"
                raise unusable(second, expected, f"{first.name} as well, with other content")
            note(f"{second} is a copy of {first.name}, which counts for step {step}")
            file = first
        found[step] = file
    return found
