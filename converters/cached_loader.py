"""Loads a run's checkpoints through the parameter store: stored conversions are read, other files are converted."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from kvjax.converters.parameter_store import ParameterStore, StoreIdentity

from kvjax.artifacts.files import HashedFile
from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import InputError
from kvjax.machine import return_free_memory
from kvjax.model.checkpoint import Checkpoint
from kvjax.model.params import Params
from kvjax.task.benchmark import Benchmark

Keep = Literal["nothing", "if possible", "everything"]

_HELD_BYTES = 64 << 20  # of converted parameters, before they are written as a part; writing takes as much memory again


class CachedLoader:
    """Loads the checkpoints of one run, for one benchmark. Several threads may call `load` at once.

    One that keeps conversions is for whoever holds the lock of the run's results. Processes that measure for the holder
    have a `shared` one each.

    Args:
      run: the run.
      benchmark: the benchmark it is measured on.
      certify_on: sample sequences [B, T] for the parity certificates; None makes no certificates.
      trust_store: use stored conversions that have a certificate. Otherwise every file is converted.
      keep: which conversions the store gets. With `if possible`, a store that cannot be written fails no checkpoint;
        only `save` raises. With `everything`, `load` raises too, so that no conversion is made in vain.
      shared: whether other processes write the store meanwhile. What killed ones left stays there then.
    """

    def __init__(
        self,
        run: RunDir,
        benchmark: Benchmark,
        *,
        certify_on: np.ndarray | None,
        trust_store: bool = True,
        keep: Keep = "if possible",
        shared: bool = False,
    ):
        self._run, self._benchmark, self._certify_on = run, benchmark, certify_on
        self._trust_store, self._keep = trust_store, keep
        self._store = ParameterStore(run.layout.converted, store_identity(run, benchmark))
        if keep != "nothing" and not shared:
            self._store.remove_unnamed()
        self._held: list[Checkpoint] = []
        self._held_bytes = 0
        self._lock = threading.Lock()
        self._read: dict[Path, HashedFile] = {}  # by `shapes`, for `load` to take

    def load(self, path: Path, expected_step: int | None) -> Checkpoint:
        """Loads a checkpoint file. Its bytes are read once: hashed, looked up, and converted if they are not stored.

        Raises:
          InputError: the file is unusable, or not of this run, step or benchmark; or `keep` is `everything` and the
            store cannot be written.
        """
        file = self._read.pop(path, None) or HashedFile.read(path, "a PyTorch checkpoint")
        if self._trust_store:
            stored = self._store.find(file)
            if stored is not None and stored.certificate is not None and expected_step in (None, stored.step):
                return stored
        # torch takes 1.5 s to import; a full store needs none of it.
        from kvjax.converters.convert import convert_checkpoint

        checkpoint = convert_checkpoint(
            path,
            self._run.config,
            self._benchmark,
            file=file,
            expected_step=expected_step,
            certify_on=self._certify_on,
        )
        if self._keep != "nothing":
            with self._lock:
                self._hold(checkpoint)
        return checkpoint

    def shapes(self, path: Path) -> Params:
        """Reads the shapes of a checkpoint file's parameters, before `load` takes the same bytes and certifies them.

        Raises:
          InputError: the file is unusable.
        """
        file = self._read[path] = HashedFile.read(path, "a PyTorch checkpoint")
        stored = self._store.find(file) if self._trust_store else None
        if stored is not None:
            params = stored.params
        else:
            from kvjax.converters.to_flax import to_flax
            from kvjax.converters.torch_checkpoint import parse_checkpoint

            vocab_size = len(self._benchmark.vocabulary.tokens)
            params = to_flax(parse_checkpoint(file).state, self._run.config.model, vocab_size, where=path)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)

    def is_stored(self, sha256: str) -> bool:
        """Checks whether the store names a certified conversion of the file with this hash, or is to get none."""
        return self._keep == "nothing" or self._store.lists_certified(sha256)

    def save(self) -> None:
        """Writes the conversions since the last call to the store.

        Raises:
          InputError: the store cannot be written.
        """
        with self._lock:
            self._write()

    def _hold(self, checkpoint: Checkpoint) -> None:
        """Holds a conversion in memory until there are enough for a part."""
        if self._held_bytes >= _HELD_BYTES:
            return  # those held could not be written; this one is converted again another time
        self._held.append(checkpoint)
        self._held_bytes += checkpoint.nbytes
        if self._held_bytes >= _HELD_BYTES:
            try:
                self._write()
                return_free_memory()
            except InputError:  # `save` tries once more, and raises
                if self._keep == "everything":
                    raise

    def _write(self) -> None:
        self._store.add(self._held)
        self._held, self._held_bytes = [], 0  # only now: after an error they are tried again


def store_identity(run: RunDir, benchmark: Benchmark) -> StoreIdentity:
    """Collects what a conversion depends on beside the file: the run, its model section and the benchmark."""
    return StoreIdentity(
        run_name=run.config.run_name,
        model=run.config.model,
        vocab_size=len(benchmark.vocabulary.tokens),
        benchmark_sha256=benchmark.hashes.earlier,  # a conversion depends on the metadata alone, not on records
    )
