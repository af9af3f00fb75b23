"""Sweeping runs: checkpoints are read ahead while the device computes, and each result is stored as it arrives."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import math
import numbers
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kvjax.artifacts.provenance import device_description, software_versions
from kvjax.artifacts.results import CheckpointResult, ResultStore
from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import InputError, unusable
from kvjax.model.decoder import DecoderConfig, Params, stack_params
from kvjax.model.transforms import checkpoint_mesh
from kvjax.sweeps.ablations import chosen_ablations, restarts_at_once
from kvjax.sweeps.chunking import plan_chunks
from kvjax.sweeps.collect import collect
from kvjax.sweeps.lowered import kept_lowered
from kvjax.sweeps.program import Program, SweepData, measure_checkpoints
from kvjax.task.donors import donors_by_bucket, draw_donors
from kvjax.task.encoding import Bucket, EncodedRecords, bucket_by_length
from kvjax.task.vocabulary import Vocabulary

# Raised whenever a measure changes, so that results of the older one are measured anew.
RESULT_VERSION = 3

NULL_PERMUTATIONS = 20
NULL_SEED = 0
DONOR_SEED = 0

_READERS = 8  # files read at once


class LoadedCheckpoint(Protocol):
    """What the sweep needs of a converted checkpoint."""

    step: int
    sha256: str
    params: Params
    certificate: Any
    notes: tuple[str, ...]


class CheckpointSource(Protocol):
    """Where a run's checkpoints come from, converted and certified."""

    def load(self, path: Path, expected_step: int | None) -> LoadedCheckpoint:
        """Returns the checkpoint of a file; may be called from several threads."""

    def save(self) -> None:
        """Keeps what was converted, so that the next time it is only read."""


# Told of each chunk, with its states, when the devices have started on it; returns what to call once it is measured.
StateWatch = Callable[[Sequence[tuple[str, LoadedCheckpoint]], jax.Array], Callable[[], None]]


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """What a sweep's numbers depend on, beside probe set and checkpoints, and how it is run.

    Attributes:
      precision: of matrix products, `highest` or `default`.
      ablations: kinds of ablation measured, of `ABLATIONS`; none for the clean run alone, which makes no tables.
      resample_draws: draws per resample ablation.
      probe: trained probes: `ridge`, `logistic` (ridge, and multinomial logistic at the named steps) or `none`.
      event_drift: whether drift of single events and linear CKA are measured.
      checkpoint_batch: `auto`, or checkpoints per device call.
      memory_gb: memory to use, of each accelerator or of the machine on a CPU; None for most of what there is.
      skip_bad: list unusable checkpoints instead of stopping at the first.
      overwrite: measure again what was measured already.
    """

    precision: str = "highest"
    ablations: tuple[str, ...] = ("zero", "mean", "resample")
    resample_draws: int = 1
    probe: str = "ridge"
    event_drift: bool = True
    checkpoint_batch: str | int = "auto"
    memory_gb: float | None = None
    skip_bad: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("precision", ("highest", "default")), ("probe", ("ridge", "logistic", "none"))):
            if getattr(self, name) not in allowed:
                raise unusable(f"--{name}", f"one of {', '.join(allowed)}", getattr(self, name))
        draws, memory = self.resample_draws, self.memory_gb
        if not (isinstance(draws, numbers.Integral) and not isinstance(draws, bool) and draws >= 1):
            raise unusable("--resample_draws", "a whole number of at least 1", draws)
        object.__setattr__(self, "resample_draws", int(draws))
        if memory is not None and not (isinstance(memory, numbers.Real) and 0 < memory < math.inf):
            raise unusable("--memory_gb", "a number above 0", memory)
        if self.ablations:  # in one order, whatever order they were named in: results are found by them
            object.__setattr__(self, "ablations", chosen_ablations(self.ablations))


@dataclasses.dataclass
class SweepLog:
    """What happened while a run was swept: which checkpoints were measured, reused or refused."""

    measured: list[int] = dataclasses.field(default_factory=list)
    reused: list[int] = dataclasses.field(default_factory=list)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    first_call_seconds: float | None = None
    later_call_seconds: list[float] = dataclasses.field(default_factory=list)
    # When the devices had last finished a call; the next, handed over before, runs from then on.
    devices_free_since: float = 0.0

    def add_call(self, handed_over: float, finished: float) -> float:
        """Notes a device call, the first with its compilation, and returns the seconds it took."""
        seconds = finished - max(handed_over, self.devices_free_since)
        self.devices_free_since = finished
        if self.first_call_seconds is None:
            self.first_call_seconds = seconds
        else:
            self.later_call_seconds.append(seconds)
        return seconds


class ProbeProgram:
    """A probe set on the devices, with the compiled program that measures checkpoints of one shape on it.

    Args:
      config: the checkpoints' shape.
      vocabulary: of the benchmark.
      encoded: the probe records.
      num_splits: splits they are in.
      settings: what is measured, and how.
      fit: the fit set's records, which mean ablation and probes need.
      max_buckets: how many lengths records are padded to.

    Attributes:
      program: the static settings that the program is compiled for.
      data: the records, on the devices.
      buckets: how they are cut into microbatches.
      chunk, devices: checkpoints per call, and how many devices share them.
    """

    def __init__(
        self,
        config: DecoderConfig,
        vocabulary: Vocabulary,
        encoded: EncodedRecords,
        num_splits: int,
        settings: SweepSettings,
        *,
        fit: EncodedRecords | None = None,
        max_buckets: int = 3,
    ):
        probes = settings.probe != "none"
        needs_fit = probes or "mean" in settings.ablations
        plan = plan_chunks(
            settings.checkpoint_batch,
            config,
            backend=jax.default_backend(),
            num_devices=jax.local_device_count(),
            num_tokens=max(encoded.tokens.size, fit.tokens.size if needs_fit and fit else 0),
            memory_gb=settings.memory_gb,
            side_by_side=restarts_at_once(config, settings.ablations, draws=settings.resample_draws),
            keeps_runs="resample" in settings.ablations,
        )
        self.chunk, self.devices = plan.checkpoints, plan.devices
        self._shape = encoded.is_read.shape
        self.buckets = bucket_by_length(encoded, tokens_per_batch=plan.tokens_per_batch, max_buckets=max_buckets)
        donors: tuple[np.ndarray, ...] = ()
        if "resample" in settings.ablations:
            drawn = draw_donors(encoded, draws=settings.resample_draws, seed=DONOR_SEED)
            donors = donors_by_bucket(drawn, self.buckets)
        fit_bucket = None
        if needs_fit:
            assert fit is not None, "mean ablation and probes need a fit set"
            (fit_bucket,) = bucket_by_length(fit, tokens_per_batch=plan.tokens_per_batch, max_buckets=1)
        data = SweepData(
            buckets=tuple(bucket.batches for bucket in self.buckets),
            donors=donors,
            fit=fit_bucket and fit_bucket.batches,
            permutations=read_permutations(fit_bucket, count=NULL_PERMUTATIONS, seed=NULL_SEED) if probes else None,
        )
        self.program = Program(
            config=dataclasses.replace(config, precision=settings.precision),
            value_ids=tuple(vocabulary.value_ids.tolist()),
            key_ids=tuple(vocabulary.key_ids.tolist()),
            num_splits=num_splits,
            horizons=tuple(bucket.horizon for bucket in self.buckets),
            ablations=settings.ablations,
            probes=probes,
            states=settings.event_drift,
            interventions=plan.interventions,
            checkpoints=plan.over_checkpoints,
            devices=plan.devices,
        )
        self.data = jax.device_put(data, NamedSharding(checkpoint_mesh(plan.devices), PartitionSpec()))
        self._measure: dict[bool, Callable[..., Any]] = {}  # by whether unembeddings are tied

    def start(self, params: Sequence[Params]) -> PendingMeasurement:
        """Starts measuring up to `chunk` checkpoints, without waiting for the devices."""
        # A last, shorter chunk is filled up: another number of checkpoints would be another program to compile.
        filled = [*params, *[params[-1]] * (self.chunk - len(params))]
        stacked = stack_params(filled)
        tied = "unembedding" not in stacked
        program = dataclasses.replace(self.program, config=dataclasses.replace(self.program.config, tied=tied))
        if tied not in self._measure:
            self._measure[tied] = kept_lowered(measure_checkpoints, program, stacked, self.data)
        *outputs, states = self._measure[tied](stacked, self.data)
        return PendingMeasurement(outputs, states, len(params), tuple(self.buckets), self._shape)

    def measure(self, params: Sequence[Params]) -> list[dict[str, np.ndarray]]:
        """Returns the measured arrays of up to `chunk` checkpoints, one mapping each."""
        return self.start(params).collect()


@dataclasses.dataclass(frozen=True)
class PendingMeasurement:
    """Checkpoints that the devices are measuring; their states stay on the devices."""

    outputs: Any
    states: jax.Array | None
    num_checkpoints: int
    buckets: tuple[Bucket, ...]
    shape: tuple[int, int]

    def collect(self) -> list[dict[str, np.ndarray]]:
        """Returns the measured arrays, one mapping per checkpoint, once they are there."""
        by_bucket, whole = jax.device_get(self.outputs)
        arrays = collect(by_bucket, self.buckets, *self.shape) | whole
        return [{name: array[c] for name, array in arrays.items()} for c in range(self.num_checkpoints)]


def read_permutations(fit: Bucket, *, count: int, seed: int) -> np.ndarray:
    """Returns orders of the fit reads' rows, int32 [1 + count, rows]: the identity, then seeded permutations.

    Only rows that are reads change places, and their order before is that of the records, so that the permutations do
    not depend on how the records are batched.
    """
    counted = (fit.batches.is_read & (fit.batches.weights > 0)[..., None]).reshape(len(fit.indices), -1)
    rows = np.arange(counted.size).reshape(counted.shape)
    in_order = np.argsort(fit.indices, kind="stable")
    reads = rows[in_order][counted[in_order]]
    rng = np.random.default_rng(seed)
    orders = np.tile(rows.reshape(-1), (1 + count, 1)).astype(np.int32)
    for order in orders[1:]:
        order[reads] = rng.permutation(reads)
    return orders


def sweep_run(
    run: RunDir,
    files: Mapping[str, tuple[int | None, Path]],
    program: ProbeProgram,
    store: ResultStore,
    source: CheckpointSource,
    *,
    settings: SweepSettings,
    log: SweepLog,
    advance: Callable[[int], None],
    watch: StateWatch | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> dict[str, CheckpointResult]:
    """Returns the results of a run's checkpoints, measuring those that are not stored already.

    Args:
      run: the run.
      files: result name -> (the step the file's name states or None, checkpoint file), in the order to measure in.
      program: what measures them.
      store: where results are kept.
      source: where checkpoints come from.
      settings: the sweep's settings.
      log: filled with what happened.
      advance: called with the number of checkpoints done, for a progress bar.
      watch: what is told of the states at the reads, where the program returns them.
      meanwhile: called when the devices are at work on the first chunk.

    Raises:
      InputError: a checkpoint cannot be used, unless `settings.skip_bad`. Results stored before stay.
    """
    results: dict[str, CheckpointResult] = {}
    pending: list[str] = []
    if settings.overwrite:
        found: Iterable[CheckpointResult | None] = itertools.repeat(None, len(files))
    else:
        with concurrent.futures.ThreadPoolExecutor() as readers:  # hashing releases the interpreter lock
            found = list(readers.map(lambda name: store.load(name, files[name][1]), files))
    for name, stored in zip(files, found, strict=True):
        if stored is None:
            pending.append(name)
        else:
            results[name] = stored
            log.reused.append(stored.step)
            advance(1)

    device, versions = device_description(), software_versions()

    def keep(
        chunk: list[tuple[str, LoadedCheckpoint]], pending: PendingMeasurement, seen: Callable[[], None], start: float
    ) -> None:
        measured = pending.collect()
        seconds = log.add_call(start, time.perf_counter())
        for (name, checkpoint), arrays in zip(chunk, measured, strict=True):
            info = {
                "file": files[name][1].name,
                "sha256": checkpoint.sha256,
                "certificate": dataclasses.asdict(checkpoint.certificate),
                "device": device,
                "precision": settings.precision,
                "versions": versions,
                "notes": list(checkpoint.notes),
                "seconds": seconds / len(chunk),
            }
            results[name] = store.save(name, checkpoint.sha256, checkpoint.step, arrays, info)
            log.measured.append(checkpoint.step)
            advance(1)
        seen()

    # The next chunk is handed to the devices before the last one's arrays are written.
    running: tuple[list, PendingMeasurement, Callable[[], None], float] | None = None
    try:
        for chunk in _chunks(_load_ahead(pending, files, source, settings, log, advance, program.chunk), program.chunk):
            start = time.perf_counter()
            started = program.start([checkpoint.params for _, checkpoint in chunk])
            seen = watch(chunk, started.states) if watch and started.states is not None else lambda: None
            before, running = running, (chunk, started, seen, start)
            if before is not None:
                keep(*before)
            else:
                meanwhile()
    finally:
        try:
            if running is not None:
                keep(*running)
        finally:
            source.save()
    return {name: results[name] for name in files if name in results}


def _load_ahead(
    names: Sequence[str],
    files: Mapping[str, tuple[int | None, Path]],
    source: CheckpointSource,
    settings: SweepSettings,
    log: SweepLog,
    advance: Callable[[int], None],
    chunk: int,
) -> Iterator[tuple[str, LoadedCheckpoint]]:
    """Yields converted checkpoints in order; those of the next chunk are read while the devices work on this one."""
    ahead = chunk + 1
    with concurrent.futures.ThreadPoolExecutor(max_workers=min(ahead, _READERS)) as readers:

        def read(name: str) -> concurrent.futures.Future[LoadedCheckpoint]:
            step, path = files[name]
            return readers.submit(source.load, path, step)

        upcoming = collections.deque(read(name) for name in names[:ahead])
        try:
            for index, name in enumerate(names):
                future = upcoming.popleft()
                if index + ahead < len(names):
                    upcoming.append(read(names[index + ahead]))
                try:
                    checkpoint = future.result()
                except InputError as error:
                    if not settings.skip_bad:
                        raise
                    log.refused[files[name][1].name] = str(error)
                    advance(1)
                    continue
                yield name, checkpoint
        finally:
            for future in upcoming:
                future.cancel()


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Yields items in lists of `size`; what was read before an unusable one is yielded before the error is raised."""
    chunk: list[Any] = []
    try:
        for item in items:
            chunk.append(item)
            if len(chunk) == size:
                yield chunk
                chunk = []
    except InputError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk
