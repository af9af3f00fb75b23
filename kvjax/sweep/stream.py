"""Sweeping runs: checkpoints are read ahead while the device computes, and each result is stored as it arrives."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from kvjax.artifacts.provenance import device_description, software_versions
from kvjax.artifacts.results import CheckpointResult, ResultStore
from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import InputError
from kvjax.model.decoder import DecoderConfig, Params, stack_params
from kvjax.sweep.chunking import plan_chunks
from kvjax.sweep.collect import collect
from kvjax.sweep.program import Program, measure_checkpoints
from kvjax.task.encoding import EncodedRecords, bucket_by_length
from kvjax.task.vocabulary import Vocabulary

# Raised whenever a measure changes, so that results of the older one are measured anew.
RESULT_VERSION = 2


class LoadedCheckpoint(Protocol):
    """What the sweep needs of a converted checkpoint."""

    step: int
    sha256: str
    params: Params
    certificate: Any
    notes: tuple[str, ...]


# (checkpoint file, the step its name states or None) -> the checkpoint, converted and certified.
LoadCheckpoint = Callable[[Path, int | None], LoadedCheckpoint]


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """What a sweep's numbers depend on, beside probe set and checkpoints, and how it is run.

    Attributes:
      precision: of matrix products, `highest` or `default`.
      checkpoint_batch: `auto`, or checkpoints per device call.
      memory_gb: accelerator memory to use; None for the default.
      skip_bad: list unusable checkpoints instead of stopping at the first.
      overwrite: measure again what was measured already.
    """

    precision: str = "highest"
    checkpoint_batch: str = "auto"
    memory_gb: float | None = None
    skip_bad: bool = False
    overwrite: bool = False


@dataclasses.dataclass
class SweepLog:
    """What happened while a run was swept: which checkpoints were measured, reused or refused."""

    measured: list[int] = dataclasses.field(default_factory=list)
    reused: list[int] = dataclasses.field(default_factory=list)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    first_call_seconds: float | None = None
    later_call_seconds: list[float] = dataclasses.field(default_factory=list)


class ProbeProgram:
    """A probe set on the device, with the compiled program that measures checkpoints of one shape on it."""

    def __init__(
        self,
        config: DecoderConfig,
        vocabulary: Vocabulary,
        encoded: EncodedRecords,
        num_splits: int,
        settings: SweepSettings,
        *,
        ablate: bool = True,
        max_buckets: int = 3,
    ):
        plan = plan_chunks(
            settings.checkpoint_batch,
            config,
            backend=jax.default_backend(),
            num_tokens=encoded.tokens.size,
            memory_gb=settings.memory_gb,
        )
        self.chunk = plan.checkpoints
        self._encoded = encoded
        self._buckets = bucket_by_length(encoded, tokens_per_batch=plan.tokens_per_batch, max_buckets=max_buckets)
        self._batches = [jax.device_put(bucket.batches) for bucket in self._buckets]
        self._program = Program(
            config=dataclasses.replace(config, precision=settings.precision),
            value_ids=tuple(vocabulary.value_ids.tolist()),
            key_ids=tuple(vocabulary.key_ids.tolist()),
            num_splits=num_splits,
            ablate=ablate,
            interventions=plan.interventions,
            checkpoints=plan.over_checkpoints,
        )

    def measure(self, params: Sequence[Params]) -> list[dict[str, np.ndarray]]:
        """Returns the measured arrays of up to `chunk` checkpoints, one mapping each."""
        # A last, shorter chunk is filled up: another number of checkpoints would be another program to compile.
        filled = [*params, *[params[-1]] * (self.chunk - len(params))]
        stacked = stack_params(filled)
        tied = "unembedding" not in stacked
        program = dataclasses.replace(self._program, config=dataclasses.replace(self._program.config, tied=tied))
        # Every bucket is started before the first is waited for.
        outputs = [measure_checkpoints(program, stacked, batches) for batches in self._batches]
        shape = self._encoded.is_read.shape
        arrays = collect(jax.device_get(outputs), self._buckets, *shape)
        return [{name: array[c] for name, array in arrays.items()} for c in range(len(params))]


def sweep_run(
    run: RunDir,
    files: Mapping[str, tuple[int | None, Path]],
    program: ProbeProgram,
    store: ResultStore,
    load: LoadCheckpoint,
    *,
    settings: SweepSettings,
    log: SweepLog,
    advance: Callable[[int], None],
) -> dict[str, CheckpointResult]:
    """Returns the results of a run's checkpoints, measuring those that are not stored already.

    Args:
      run: the run.
      files: result name -> (the step the file's name states or None, checkpoint file).
      program: what measures them.
      store: where results are kept.
      load: reads, converts and certifies one file.
      settings: the sweep's settings.
      log: filled with what happened.
      advance: called with the number of checkpoints done, for a progress bar.

    Raises:
      InputError: a checkpoint cannot be used, unless `settings.skip_bad`. Results stored before stay.
    """
    results: dict[str, CheckpointResult] = {}
    pending: list[str] = []
    for name, (_, path) in files.items():
        stored = None if settings.overwrite else store.load(name, path)
        if stored is None:
            pending.append(name)
        else:
            results[name] = stored
            log.reused.append(stored.step)
            advance(1)

    device, versions = device_description(), software_versions()
    for chunk in _chunks(_load_ahead(pending, files, load, settings, log, advance), program.chunk):
        start = time.perf_counter()
        measured = program.measure([checkpoint.params for _, checkpoint in chunk])
        seconds = time.perf_counter() - start
        if log.first_call_seconds is None:
            log.first_call_seconds = seconds
        else:
            log.later_call_seconds.append(seconds)
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
    return {name: results[name] for name in files if name in results}


def _load_ahead(
    names: Sequence[str],
    files: Mapping[str, tuple[int | None, Path]],
    load: LoadCheckpoint,
    settings: SweepSettings,
    log: SweepLog,
    advance: Callable[[int], None],
) -> Iterator[tuple[str, LoadedCheckpoint]]:
    """Yields converted checkpoints in order; the next is read while the caller computes on this one."""

    def read(name: str) -> LoadedCheckpoint:
        step, path = files[name]
        return load(path, step)

    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as reader:
        upcoming = [reader.submit(read, name) for name in names[:2]]
        try:
            for index, name in enumerate(names):
                future = upcoming.pop(0)
                if index + 2 < len(names):
                    upcoming.append(reader.submit(read, names[index + 2]))
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
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
