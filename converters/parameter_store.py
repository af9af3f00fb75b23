"""A run's converted parameters: stacked Orbax parts, and a manifest that lists the checkpoints in them.

A store grows by parts. New checkpoints are written as one more stacked tree; existing parts stay as they are. Orbax
takes 16 ms to read a tree of any small size, so that checkpoints of one part share that time (docs/performance.md).
Each manifest entry carries a digest of itself and of its parameters. An entry that does not match its digest counts as
absent, and its checkpoint is converted again.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pydantic
from absl import logging

from kvjax.artifacts.files import HashedFile, digest, read_json, replace_directory, write_json
from kvjax.artifacts.run_lock import in_turn
from kvjax.config.run import ModelConfig
from kvjax.errors import InputError, unusable
from kvjax.model.checkpoint import Certificate, Checkpoint
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params

_MANIFEST = "manifest.json"
_LOCK = "lock"  # held while the manifest is read and written
_VERSION = 4
_PARTS_AT_HAND = 2  # whoever reads a run in the order of its steps is done with a part when it needs the next
_ROOM_BESIDE = 1_000_000  # bytes of manifest and Orbax's own files, at most
_CHUNK_BYTES = 4 << 20  # arrays are cut so that several threads read one; measured in docs/performance.md

_saving = threading.Lock()  # Orbax names the operation at work in one place for all threads, and mixes two saves up


class _Schema(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class StoreIdentity(_Schema):
    """Everything that a conversion depends on beside the checkpoint file."""

    run_name: str
    model: ModelConfig
    vocab_size: int
    benchmark_sha256: str

    def config(self, params: Params) -> DecoderConfig:
        """Reads the shape of a converted parameter tree."""
        return DecoderConfig.from_model_config(self.model, self.vocab_size, tied="unembedding" not in params)


class StoredCheckpoint(_Schema):
    """The manifest's entry of one checkpoint.

    Attributes:
      sha256: the hash of the `.pt` file.
      recorded_config: the hash of the config that the trainer recorded in the file.
      part, index: where the parameters lie.
      digest: the hash of the parameters and of every other field but `part` and `index`.
    """

    step: int
    file: str
    sha256: str
    certificate: Certificate | None
    metrics: dict[str, Any]
    notes: list[str]
    recorded_config: str
    part: str
    index: int = pydantic.Field(ge=0)
    digest: str

    def computed_digest(self, params: Params) -> str:
        """Computes the digest of an entry with these parameters."""
        fields = self.model_dump(mode="json", exclude={"part", "index", "digest"})
        return digest([fields, tree_sha256(params)])


class StoreManifest(_Schema):
    """The list of a store's checkpoints; `recorded_configs` holds each config that a trainer recorded once, by hash."""

    kvjax_parameter_store: Literal[4] = _VERSION
    identity: StoreIdentity
    checkpoints: list[StoredCheckpoint]
    recorded_configs: dict[str, dict[str, Any]]

    @pydantic.model_validator(mode="after")
    def _check_configs(self) -> StoreManifest:
        if any(digest(config) != name for name, config in self.recorded_configs.items()):
            raise ValueError("expected recorded configs named by their hash")
        return self

    @functools.cached_property
    def by_sha256(self) -> dict[str, StoredCheckpoint]:
        """The checkpoints by the hash of their `.pt` file."""
        return {stored.sha256: stored for stored in reversed(self.checkpoints)}

    @property
    def parts(self) -> set[str]:
        """The names of the parts that hold the checkpoints."""
        return {stored.part for stored in self.checkpoints}


class ParameterStore:
    """The store in a folder, for one identity. Several threads may use it at once.

    Args:
      folder: the store's folder, made when the first checkpoint is added.
      identity: what the conversions depend on. A store of another identity counts as empty, and is replaced.
    """

    def __init__(self, folder: Path, identity: StoreIdentity):
        self.folder = folder
        self._identity = identity
        self._manifest = self._read_own_manifest()
        self._lock = threading.Lock()
        self._part = functools.lru_cache(maxsize=_PARTS_AT_HAND)(lambda name: _read_part(folder / name))

    def find(self, file: HashedFile) -> Checkpoint | None:
        """Finds the stored conversion of a `.pt` file; gives None if it is not cached or the cached copy is corrupt."""
        manifest = self._manifest
        stored = manifest and manifest.by_sha256.get(file.sha256)
        if not stored:
            return None
        with self._lock:  # a part is read once, whoever asks first
            part = self._part(stored.part)
        return _checkpoint(manifest, stored, part, file.path)

    def lists_certified(self, sha256: str) -> bool:
        """Checks whether the manifest names a certified conversion of a `.pt` file, by the file's hash."""
        stored = self._manifest and self._manifest.by_sha256.get(sha256)
        return bool(stored) and stored.certificate is not None

    def add(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Writes checkpoints as one more part, or as two if only some have a tied unembedding.

        Earlier entries of the same files are dropped.

        Raises:
          InputError: the folder cannot be written to.
        """
        by_structure = collections.defaultdict(list)
        for checkpoint in {checkpoint.sha256: checkpoint for checkpoint in checkpoints}.values():
            by_structure[checkpoint.config.tied].append(checkpoint)
        with self._lock:
            for group in by_structure.values():
                try:
                    self._add(group)
                except InputError:
                    raise
                except (OSError, ValueError, RuntimeError) as error:  # TensorStore has no exception class of its own
                    raise unusable(self.folder, "a folder that can be written", error) from None

    def _add(self, checkpoints: Sequence[Checkpoint]) -> None:
        new = [_entry(checkpoint, index) for index, checkpoint in enumerate(checkpoints)]
        name = f"part_{digest([stored.digest for stored in new])[:16]}"
        new = [stored.model_copy(update={"part": name}) for stored in new]
        with replace_directory(self.folder / name) as partial:
            stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *[checkpoint.params for checkpoint in checkpoints])
            _check_free_space(self.folder, stacked)
            save_tree(partial / "params", stacked)
        with in_turn(self.folder / _LOCK):
            self._name(name, new, checkpoints)

    def _name(self, name: str, new: Sequence[StoredCheckpoint], checkpoints: Sequence[Checkpoint]) -> None:
        """Names a part in the manifest; what other processes have added since it was read stays."""
        before = self._read_own_manifest()
        # A file that has changed since has one entry, its newest.
        replaced = {known for stored in new for known in (stored.sha256, stored.file)}
        kept = [c for c in before.checkpoints if not {c.sha256, c.file} & replaced] if before else []
        entries = sorted([*kept, *new], key=lambda stored: (stored.step, stored.file))
        configs = dict(before.recorded_configs) if before else {}
        configs |= {digest(checkpoint.recorded_config): dict(checkpoint.recorded_config) for checkpoint in checkpoints}
        manifest = StoreManifest(
            identity=self._identity,
            checkpoints=entries,
            recorded_configs={stored.recorded_config: configs[stored.recorded_config] for stored in entries},
        )
        try:
            write_json(self.folder / _MANIFEST, manifest.model_dump(mode="json"))
        except (OSError, InputError):
            if before is None or name not in before.parts:  # nothing names it, and room may be what is missing
                shutil.rmtree(self.folder / name, ignore_errors=True)
            raise
        self._manifest = manifest
        self._part.cache_clear()
        for part in (before.parts if before else set()) - manifest.parts:
            shutil.rmtree(self.folder / part, ignore_errors=True)

    def remove_unnamed(self) -> None:
        """Removes parts of processes that died before they named them in the manifest.

        No other process may write the store meanwhile: whoever calls this holds the lock of the run's results, and
        shares it with no process that measures.
        """
        manifest = _read_manifest(self.folder)
        if manifest is None and (self.folder / _MANIFEST).exists():
            return  # of another version, or damaged: the next part begins a new one
        for part in self.folder.glob("part_*"):
            if manifest is None or part.name not in manifest.parts:
                shutil.rmtree(part, ignore_errors=True)

    def _read_own_manifest(self) -> StoreManifest | None:
        manifest = _read_manifest(self.folder)
        return manifest if manifest is not None and manifest.identity == self._identity else None


def stored_sha256s(folder: Path) -> frozenset[str]:
    """Lists the hashes of the `.pt` files that a store holds the parameters of; none if there is no store."""
    manifest = _read_manifest(folder)
    return frozenset(stored.sha256 for stored in manifest.checkpoints) if manifest else frozenset()


def read_stored_run(folder: Path) -> Iterator[Checkpoint]:
    """Yields every checkpoint of a store in the order of steps, of any identity. Paths are the `.pt` files' names.

    Raises:
      InputError: there is no store, or it is damaged.
    """
    manifest = _read_manifest(folder)
    if manifest is None:
        raise unusable(folder, "converted parameters (kvjax convert --to=flax)", "none, or a damaged manifest")
    part = functools.lru_cache(maxsize=_PARTS_AT_HAND)(lambda name: _read_part(folder / name))
    for stored in manifest.checkpoints:
        checkpoint = _checkpoint(manifest, stored, part(stored.part), Path(stored.file))
        if checkpoint is None:
            raise unusable(
                folder / stored.part,
                f"the parameters the manifest names for {stored.file} (convert them again: kvjax convert --to=flax)",
                "none, or damaged ones",
            )
        yield checkpoint


def save_tree(path: Path, tree: Params) -> None:
    """Writes a tree of arrays with Orbax, uncompressed: float32 weights do not compress, and reading stays fast.

    Several threads may call it; it writes one tree after the other.
    """
    from orbax.checkpoint import v1 as orbax  # a second to import, for nothing else in the project

    context = orbax.Context()
    context.array.saving.use_compression = False
    context.array.saving.storage_options = context.array.saving.StorageOptions(chunk_byte_size=_CHUNK_BYTES)
    with _saving, context, _nothing_logged():
        orbax.save(path.resolve(), tree)


@contextlib.contextmanager
def _nothing_logged() -> Iterator[None]:
    """Keeps Orbax's threads from logging the tracebacks of an error that is raised as well."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_tree(path: Path) -> Params:
    """Reads the tree of NumPy arrays that `save_tree` wrote."""
    from orbax.checkpoint import v1 as orbax

    return orbax.load(path.resolve())


def tree_sha256(params: Params) -> str:
    """Hashes a tree's structure, shapes, types and values."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()


def _entry(checkpoint: Checkpoint, index: int) -> StoredCheckpoint:
    """Forms the manifest entry of a checkpoint, without the name of its part."""
    entry = StoredCheckpoint(
        step=checkpoint.step,
        file=checkpoint.path.name,
        sha256=checkpoint.sha256,
        certificate=checkpoint.certificate,
        metrics=dict(checkpoint.recorded_metrics),
        notes=list(checkpoint.notes),
        recorded_config=digest(checkpoint.recorded_config),
        part="",
        index=index,
        digest="",
    )
    return entry.model_copy(update={"digest": entry.computed_digest(checkpoint.params)})


def _checkpoint(
    manifest: StoreManifest, stored: StoredCheckpoint, part: Params | None, path: Path
) -> Checkpoint | None:
    """Takes an entry's checkpoint from a part; gives None if the part does not hold the parameters that it names."""
    if part is None or stored.recorded_config not in manifest.recorded_configs:
        return None
    if any(stored.index >= len(leaf) for leaf in jax.tree.leaves(part)):
        return None
    params = jax.tree.map(lambda leaf: leaf[stored.index], part)
    if stored.computed_digest(params) != stored.digest:
        return None
    return Checkpoint(
        step=stored.step,
        params=params,
        config=manifest.identity.config(params),
        path=path,
        sha256=stored.sha256,
        certificate=stored.certificate,
        recorded_config=manifest.recorded_configs[stored.recorded_config],
        recorded_metrics=stored.metrics,
        notes=tuple(stored.notes),
    )


def _check_free_space(folder: Path, tree: Params) -> None:
    """Raises `InputError` if a tree is larger than the free space.

    TensorStore's threads print tracebacks if the disk fills up while they write.
    """
    needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)), shutil.disk_usage(folder).free
    if free < needed + _ROOM_BESIDE:
        raise unusable(folder, f"a disk with {(needed + _ROOM_BESIDE) / 1e6:.0f} MB free", f"{free / 1e6:.0f} MB")


def _read_manifest(folder: Path) -> StoreManifest | None:
    if not (folder / _MANIFEST).is_file():
        return None
    try:
        return StoreManifest.model_validate(read_json(folder / _MANIFEST))
    except (pydantic.ValidationError, InputError):
        return None


def _read_part(path: Path) -> Params | None:
    """Reads a part's stacked parameters; None if they are missing or damaged."""
    try:
        return load_tree(path / "params")
    except Exception:  # Orbax and TensorStore raise many kinds for a damaged store
        return None
