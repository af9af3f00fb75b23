"""Sweeping runs: checkpoints are read ahead while the device computes, and each result is stored as it arrives."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from kvjax.artifacts.checkpoint_sums import CheckpointResult, ResultStore
from kvjax.artifacts.provenance import device_description, software_versions
from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import InputError
from kvjax.model.checkpoint import Checkpoint, CheckpointSource
from kvjax.sweeps.compiled_sweep import PendingMeasurement, ProbeProgram
from kvjax.sweeps.settings import SweepSettings

_READERS = 8  # files read at once


# Told of each chunk, with its states, when the devices have started on it; returns what to call once it is measured.
StateWatch = Callable[[Sequence[tuple[str, Checkpoint]], jax.Array], Callable[[], None]]


@dataclasses.dataclass
class SweepLog:
    """What happened while a run was swept: which checkpoints were measured, reused or refused.

    `not_kept` says why converted parameters could not be kept, where they could not.
    """

    measured: list[int] = dataclasses.field(default_factory=list)
    reused: list[int] = dataclasses.field(default_factory=list)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    not_kept: str | None = None
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
        chunk: list[tuple[str, Checkpoint]], pending: PendingMeasurement, seen: Callable[[], None], start: float
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
            try:
                source.save()
            except InputError as error:  # results are stored, and conversions are made again another time
                log.not_kept = str(error)
    return {name: results[name] for name in files if name in results}


def _load_ahead(
    names: Sequence[str],
    files: Mapping[str, tuple[int | None, Path]],
    source: CheckpointSource,
    settings: SweepSettings,
    log: SweepLog,
    advance: Callable[[int], None],
    chunk: int,
) -> Iterator[tuple[str, Checkpoint]]:
    """Yields converted checkpoints in order; those of the next chunk are read while the devices work on this one."""
    ahead = chunk + 1
    with concurrent.futures.ThreadPoolExecutor(max_workers=min(ahead, _READERS)) as readers:

        def read(name: str) -> concurrent.futures.Future[Checkpoint]:
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
