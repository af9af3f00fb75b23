"""A run's checkpoints as Flax parameters: read from the store where it has them, converted and kept where not."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Literal

import numpy as np

from kvjax.artifacts.files import file_sha256
from kvjax.artifacts.parameter_store import NewCheckpoint, ParameterStore
from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import InputError, unusable
from kvjax.model.checkpoint import Certificate, Checkpoint
from kvjax.model.decoder import DecoderConfig, Params
from kvjax.task.benchmark import Benchmark

Keep = Literal["nothing", "if possible", "everything"]

_KEPT_AT_ONCE = 64  # converted checkpoints held in memory before they are written as a part


class CheckpointLibrary:
    """The checkpoints of one run, for one benchmark. `load` may be called from several threads.

    Args:
      run: the run.
      benchmark: what it is measured on.
      certify_on: sample sequences [B, T] for the parity certificates; None for none.
      trust_store: take stored conversions that have a certificate; otherwise everything is converted anew.
      keep: what is put into the store of what is converted. `if possible`, a store that cannot be written fails no
        checkpoint, and only `save` tells; where `everything` is to be kept, no more is converted either.
    """

    def __init__(
        self,
        run: RunDir,
        benchmark: Benchmark,
        *,
        certify_on: np.ndarray | None,
        trust_store: bool = True,
        keep: Keep = "if possible",
    ):
        self._run, self._benchmark, self._certify_on = run, benchmark, certify_on
        self._trust_store, self._keep = trust_store, keep
        self._store = ParameterStore(run.layout.converted, store_identity(run, benchmark))
        self._new: list[Checkpoint] = []
        self._lock = threading.Lock()

    def load(self, path: Path, expected_step: int | None) -> Checkpoint:
        """Returns a checkpoint file's parameters, with its certificate.

        Raises:
          InputError: the file is unusable, or not of this run, step or benchmark; or the store cannot be written, where
            everything is to be kept.
        """
        if not path.is_file():
            raise unusable(path, "a PyTorch checkpoint", "no such file")
        if self._trust_store:
            sha256 = file_sha256(path)  # outside the lock, so that readers hash side by side
            with self._lock:
                found = self._store.find(sha256)
            if found is not None and found[0].certificate is not None and expected_step in (None, found[0].step):
                stored, params = found
                return Checkpoint(
                    step=stored.step,
                    params=params,
                    config=self._config(params),
                    path=path,
                    sha256=sha256,
                    certificate=Certificate(**stored.certificate),
                    recorded_config=self._store.recorded_config,
                    recorded_metrics=stored.metrics,
                    notes=tuple(stored.notes),
                )
        from kvjax.converters.convert import (
            convert_checkpoint,  # torch takes 1.5 s to import; a full store needs none of it
        )

        checkpoint = convert_checkpoint(
            path, self._run.config, self._benchmark, expected_step=expected_step, certify_on=self._certify_on
        )
        if self._keep != "nothing":
            with self._lock:
                self._hold(checkpoint)
        return checkpoint

    def _config(self, params: Params) -> DecoderConfig:
        vocab_size = len(self._benchmark.vocabulary.tokens)
        return DecoderConfig.from_model_config(self._run.config.model, vocab_size, tied="unembedding" not in params)

    def save(self) -> None:
        """Writes what was converted since the last time into the store.

        Raises:
          InputError: it cannot be written.
        """
        with self._lock:
            self._write()

    def _hold(self, checkpoint: Checkpoint) -> None:
        """Holds a conversion until there are enough for a part."""
        if len(self._new) >= _KEPT_AT_ONCE:
            return  # those held could not be written, and no more are held: this one is converted again another time
        self._new.append(checkpoint)
        if len(self._new) == _KEPT_AT_ONCE:
            try:
                self._write()
            except InputError:  # `save` tries once more, and tells
                if self._keep == "everything":
                    raise

    def _write(self) -> None:
        for tied in (True, False):  # trees of one part have one structure
            group = [c for c in self._new if _is_tied(c) == tied]
            if group:
                new = [_to_store(c) for c in {c.sha256: c for c in group}.values()]
                self._store.add(new, group[0].recorded_config)
                self._new = [c for c in self._new if _is_tied(c) != tied]  # only now: else it is tried again


def _is_tied(checkpoint: Checkpoint) -> bool:
    return "unembedding" not in checkpoint.params


def _to_store(checkpoint: Checkpoint) -> NewCheckpoint:
    return NewCheckpoint(
        step=checkpoint.step,
        file=checkpoint.path.name,
        sha256=checkpoint.sha256,
        certificate=checkpoint.certificate and dataclasses.asdict(checkpoint.certificate),
        metrics=dict(checkpoint.recorded_metrics),
        notes=checkpoint.notes,
        params=checkpoint.params,
    )


def store_identity(run: RunDir, benchmark: Benchmark) -> dict[str, object]:
    """Returns what a conversion depends on beside the file: the run, its model section and the benchmark."""
    return {
        "run_name": run.config.run_name,
        "model": run.config.model.model_dump(),
        "vocab_size": len(benchmark.vocabulary.tokens),
        "benchmark_sha256": benchmark.sha256,
    }
