"""Finds and checks what a run is measured on: its benchmark, probe set and checkpoint files."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kvjax.artifacts.layout import step_name
from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import bad_argument, unusable
from kvjax.task.benchmark import Benchmark
from kvjax.task.encoding import EncodedRecords, encode_records
from kvjax.task.probe_set import (
    ProbeSet,
    frozen_manifest,
    has_probe_set,
    install_probe_set,
    installed_sha256,
    open_probe_set,
    own_probe_set,
)

BEST = "best"  # the result name of the best checkpoint, which may be no step checkpoint

_CERTIFICATE_SEQUENCES = 16


@dataclasses.dataclass(frozen=True)
class RunInputs:
    """A run with its benchmark, probe set and the checkpoint files to measure.

    Attributes:
      run: the directory.
      benchmark: the benchmark it was trained on.
      probe: the probe set.
      encoded, fit: the probe set's records and its fit set's, as arrays.
      wanted: result name -> (step that the file's name states or None, file) of the checkpoints to measure.
      named: the wanted checkpoints that `steps` names; the reference is measured as well.
      reference: result name of the checkpoint that drift is measured to; None if the run has none yet.
      reference_given: what it was named by: `final`, `best` or a step.
    """

    run: RunDir
    benchmark: Benchmark
    probe: ProbeSet
    encoded: EncodedRecords
    fit: EncodedRecords
    wanted: Mapping[str, tuple[int | None, Path]]
    named: frozenset[str]
    reference: str | None
    reference_given: str

    def reference_first(self) -> dict[str, tuple[int | None, Path]]:
        """Orders the wanted files for measuring: the reference first, so that later ones are compared at once."""
        first = {self.reference: self.wanted[self.reference]} if self.reference else {}
        return first | dict(self.wanted)

    @property
    def certificate_tokens(self) -> np.ndarray:
        """Sample sequences for parity certificates, spread over the probe set: [B, T]."""
        spread = np.linspace(0, len(self.encoded) - 1, min(_CERTIFICATE_SEQUENCES, len(self.encoded)))
        return self.encoded.tokens[spread.astype(int)]


class OpenedInputs:
    """Shares inputs among runs.

    Benchmarks and equal probe sets are opened once, runs' own probe sets are chosen once for each benchmark, and equal
    records are encoded once.
    """

    def __init__(self) -> None:
        self.benchmark = functools.cache(Benchmark.open)
        self._probe_sets: dict[tuple[Path, str], ProbeSet] = {}
        self._chosen: dict[str, ProbeSet] = {}
        self._own: dict[tuple[str | None, str], ProbeSet] = {}  # by content and benchmark
        self._encoded: dict[tuple[str, str, int], tuple[EncodedRecords, EncodedRecords]] = {}

    def probe_set(self, path: Path, benchmark: Benchmark) -> ProbeSet:
        """Opens the probe set of a benchmark."""
        key = (path, benchmark.sha256)
        if key not in self._probe_sets:
            self._probe_sets[key] = open_probe_set(path, benchmark)
        return self._probe_sets[key]

    def own_probe_set(self, path: Path, benchmark: Benchmark) -> ProbeSet:
        """Opens a run's own probe set; an absent one is made, or copied from the first run that got one here."""
        absent = not has_probe_set(path)
        if absent and (chosen := self._chosen.get(benchmark.sha256)):
            install_probe_set(chosen, path)
            return dataclasses.replace(chosen, path=path)
        if not absent and (equal := self._own.get((installed_sha256(path), benchmark.sha256))):
            frozen_manifest(path)  # its files are compared with their hashes all the same
            return dataclasses.replace(equal, path=path)
        probe = own_probe_set(path, benchmark)
        self._own[probe.manifest.content_sha256, benchmark.sha256] = probe
        if absent:
            self._chosen[benchmark.sha256] = probe
        return probe

    def encoded(self, probe: ProbeSet, benchmark: Benchmark, max_seq_len: int) -> tuple[EncodedRecords, EncodedRecords]:
        """Encodes a probe set's records and its fit set's as arrays."""
        key = (probe.manifest.content_sha256, benchmark.sha256, max_seq_len)
        if key not in self._encoded:
            limits = {"max_seq_len": max_seq_len, "source": probe.path}
            encode = functools.partial(encode_records, vocabulary=benchmark.vocabulary, **limits)
            self._encoded[key] = (
                encode(probe.records, splits=probe.manifest.splits),
                encode(probe.fit_records, splits=[probe.manifest.fit_split]),
            )
        return self._encoded[key]


def prepare_run(
    run: RunDir,
    *,
    benchmark_dir: str | None,
    probe_set: str | None,
    steps: str | int | Sequence[int],
    reference: str,
    still_training: bool = False,
    opened: OpenedInputs | None = None,
) -> RunInputs:
    """Finds and checks everything that a sweep of a run needs; nothing is measured yet.

    Args:
      run: the directory.
      benchmark_dir: its benchmark; the one that its config records, or that it was swept on, if None.
      probe_set: file of the probe set; the one in the run's analysis folder if None, which is made if absent.
      steps: the checkpoints to measure, as `select_steps` takes them.
      reference: `final`, `best` or a step.
      still_training: whether the final checkpoint is still to come. If not, the last is the final one, also of a run
        that stopped before its planned end.
      opened: the inputs opened for other runs.

    Raises:
      InputError: benchmark, probe set, steps or reference cannot be used.
    """
    opened = opened or OpenedInputs()
    benchmark = opened.benchmark(run.benchmark_dir(benchmark_dir))
    wanted = {step_name(step): (step, run.checkpoints[step]) for step in run.select_steps(steps)}
    named = frozenset(wanted)
    reference_name = _reference_name(run, reference, still_training=still_training)
    if reference_name is not None:
        wanted[reference_name] = result_file(run, reference_name)
    given = Path(probe_set) if probe_set else None
    probe = opened.probe_set(given, benchmark) if given else opened.own_probe_set(run.layout.probe_set, benchmark)
    encoded, fit = opened.encoded(probe, benchmark, run.config.model.max_seq_len)
    return RunInputs(run, benchmark, probe, encoded, fit, wanted, named, reference_name, reference)


def step_files(run: RunDir) -> dict[str, tuple[int | None, Path]]:
    """Lists a run's step checkpoints: result name -> (step, file)."""
    return {step_name(step): (step, path) for step, path in run.checkpoints.items()}


def result_file(run: RunDir, name: str) -> tuple[int | None, Path]:
    """Finds the checkpoint file that a result was measured on, and the step that its name states (None for the best).

    Raises:
      InputError: the run no longer has it.
    """
    if name == BEST:
        return None, run.best_checkpoint()[1]
    files = step_files(run)
    if name not in files:
        raise unusable(run.layout.checkpoints, f"the checkpoint {name}", run.describe_steps())
    return files[name]


def _reference_name(run: RunDir, reference: str, *, still_training: bool) -> str | None:
    if reference == "final":
        to_come = still_training and not run.complete
        return None if to_come else step_name(max(run.checkpoints))
    if reference == BEST:
        return BEST
    if not reference.isdecimal():
        raise bad_argument("reference", "final, best or a step", reference)
    if int(reference) not in run.checkpoints:
        raise unusable(run.layout.checkpoints, f"a checkpoint for `reference={reference}`", run.describe_steps())
    return step_name(int(reference))
