"""Converted parameters of a run's checkpoints: stacked Orbax parts, and a manifest that says what they are.

A store grows by parts: new checkpoints are written as one more stacked tree, nothing written before is touched. Each
checkpoint is named by the SHA-256 of the `.pt` file it came from, each part by the SHA-256 of its parameters, and the
manifest carries a SHA-256 of itself; what does not match is as good as absent, and is converted again.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pydantic
from absl import logging

from kvjax.artifacts.files import read_json, replace_directory, write_json
from kvjax.errors import InputError, unusable

_MANIFEST = "manifest.json"

Tree = dict[str, Any]

_VERSION = 3
_BYTES_AT_HAND = 512 << 20
_DAY = 86400.0
_ROOM_BESIDE = 1_000_000  # bytes of manifest and Orbax's own files, at most

_CHUNK_BYTES = 4 << 20  # arrays are cut so that several threads read one; measured in docs/performance.md


class StoredCheckpoint(pydantic.BaseModel):
    """One checkpoint of the store.

    `part` and `index` say where its parameters lie; `metrics` is what the trainer recorded in the file,
    `notes` what a reader should know of it.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    step: int
    file: str
    sha256: str
    certificate: dict[str, Any] | None
    metrics: dict[str, Any]
    notes: list[str]
    part: str
    index: int


class StoreManifest(pydantic.BaseModel):
    """What a store holds.

    `identity` is what every conversion depended on beside its file: run, model section, benchmark. `parts` names the
    Orbax folders, each by the hash of the parameters in it. `sha256` is of all the rest, so that no checkpoint is taken
    for another.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    kvjax_parameter_store: Literal[3] = _VERSION
    identity: dict[str, Any]
    checkpoints: list[StoredCheckpoint]
    parts: dict[str, str]
    recorded_config: dict[str, Any]
    sha256: str = ""

    def content_sha256(self) -> str:
        """Returns the hash of everything but `sha256`."""
        content = json.dumps(self.model_dump(exclude={"sha256"}), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class NewCheckpoint:
    """A checkpoint to store: its parameters, and what `StoredCheckpoint` says of it."""

    step: int
    file: str
    sha256: str
    certificate: dict[str, Any] | None
    metrics: dict[str, Any]
    notes: Sequence[str]
    params: Tree


class ParameterStore:
    """The store in a folder, opened for one identity; parts are read when a checkpoint in them is asked for.

    Args:
      folder: where it lies, or will.
      identity: what conversions depend on beside the file. A store of another identity counts as empty.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        self.folder = folder
        self._identity = dict(identity)
        self._parts: dict[str, Tree] = {}  # those used last, in that order
        self._damaged: set[str] = set()
        self._manifest = self._read_own_manifest()

    @property
    def recorded_config(self) -> Mapping[str, Any]:
        """The `config` that the trainer recorded in the newest checkpoint."""
        return self._manifest.recorded_config if self._manifest else {}

    def find(self, sha256: str) -> tuple[StoredCheckpoint, Tree] | None:
        """Returns what is stored of the `.pt` file with that hash; None where nothing is, or what is is damaged."""
        for stored in self._manifest.checkpoints if self._manifest else ():
            if stored.sha256 == sha256:
                part = self._part(stored.part)
                return None if part is None else (stored, _member(part, stored.index))
        return None

    def add(self, checkpoints: Sequence[NewCheckpoint], recorded_config: Mapping[str, Any]) -> None:
        """Writes checkpoints as one more part; earlier entries of the same files, and damaged parts, are dropped.

        Raises:
          InputError: the folder cannot be written to.
        """
        if not checkpoints:
            return
        try:
            self._add(checkpoints, recorded_config)
        except InputError:
            raise
        except (OSError, ValueError, RuntimeError) as error:  # TensorStore has no kind of its own
            raise unusable(self.folder, "a folder that can be written", error) from None

    def _add(self, checkpoints: Sequence[NewCheckpoint], recorded_config: Mapping[str, Any]) -> None:
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *[checkpoint.params for checkpoint in checkpoints])
        sha256 = tree_sha256(stacked)
        name = f"part_{sha256[:16]}"
        with replace_directory(self.folder / name) as partial:
            _check_free_space(self.folder, stacked)
            save_tree(partial / "params", stacked)
        kept, parts = [], {}
        before = self._read_own_manifest()  # only now: another process may have added while the part was written
        if before:
            # A file that has changed since has one entry, its newest.
            replaced = {known for checkpoint in checkpoints for known in (checkpoint.sha256, checkpoint.file)}
            kept = [c for c in before.checkpoints if not {c.sha256, c.file} & replaced and c.part not in self._damaged]
            parts = {name: before.parts[name] for name in {c.part for c in kept}}
        new = [
            StoredCheckpoint(
                **{f.name: getattr(c, f.name) for f in dataclasses.fields(c) if f.name not in ("params", "notes")},
                notes=list(c.notes),
                part=name,
                index=index,
            )
            for index, c in enumerate(checkpoints)
        ]
        manifest = StoreManifest(
            identity=self._identity,
            checkpoints=sorted([*kept, *new], key=lambda c: (c.step, c.file)),
            parts={**parts, name: sha256},
            recorded_config=dict(recorded_config),
        )
        manifest = manifest.model_copy(update={"sha256": manifest.content_sha256()})
        try:
            write_json(self.folder / _MANIFEST, manifest.model_dump())
        except (OSError, InputError):
            if before is None or name not in before.parts:  # nothing names it, and room may be what is missing
                shutil.rmtree(self.folder / name, ignore_errors=True)
            raise
        self._manifest = manifest
        self._damaged.discard(name)
        self._remove_unnamed(superfluous=set(before.parts) if before else set())

    def _read_own_manifest(self) -> StoreManifest | None:
        manifest = _read_manifest(self.folder)
        return manifest if manifest is not None and manifest.identity == self._identity else None

    def _remove_unnamed(self, *, superfluous: set[str]) -> None:
        """Removes parts that nothing names any more, and what processes that died left; not what others are writing."""
        for folder in self.folder.iterdir():
            if folder.name in self._manifest.parts:
                continue
            with contextlib.suppress(OSError):  # another process renamed or removed it in the meantime
                if folder.is_dir() and (folder.name in superfluous or time.time() - folder.stat().st_mtime > _DAY):
                    shutil.rmtree(folder, ignore_errors=True)

    def _part(self, name: str) -> Tree | None:
        """Returns a part's stacked parameters, or None where they are not what the manifest names."""
        if name in self._parts:
            self._parts[name] = self._parts.pop(name)  # used last
        elif name not in self._damaged:
            part = _read_part(self.folder / name, self._manifest.parts.get(name))
            if part is None:
                self._damaged.add(name)
                return None
            # Whoever reads a run of thousands of checkpoints needs one part after another, not all of them.
            while self._parts and sum(map(_num_bytes, [part, *self._parts.values()])) > _BYTES_AT_HAND:
                del self._parts[next(iter(self._parts))]
            self._parts[name] = part
        return self._parts.get(name)


def read_stored_run(folder: Path) -> tuple[StoreManifest, list[Tree]]:
    """Returns a store's manifest and the parameters of each of its checkpoints, whatever identity it has.

    Raises:
      InputError: there is no store, or it is damaged.
    """
    manifest = _read_manifest(folder)
    if manifest is None:
        raise unusable(folder, "converted parameters (kvjax convert --to=flax)", "none, or a damaged manifest")
    parts = {name: _read_part(folder / name, sha256) for name, sha256 in manifest.parts.items()}
    for stored in manifest.checkpoints:
        if parts.get(stored.part) is None:
            raise unusable(folder / stored.part, "the parameters the manifest names", "none, or others")
    return manifest, [_member(parts[stored.part], stored.index) for stored in manifest.checkpoints]


def save_tree(path: Path, tree: Tree) -> None:
    """Writes a tree of arrays with Orbax, uncompressed: float32 weights do not compress, and reading stays fast."""
    from orbax.checkpoint import v1 as orbax  # a second to import, for nothing else in the project

    context = orbax.Context()
    context.array.saving.use_compression = False
    context.array.saving.storage_options = context.array.saving.StorageOptions(chunk_byte_size=_CHUNK_BYTES)
    with context, _nothing_logged():
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


def load_tree(path: Path) -> Tree:
    """Returns the tree of NumPy arrays that `save_tree` wrote."""
    from orbax.checkpoint import v1 as orbax

    return orbax.load(path.resolve())


def tree_sha256(params: Tree) -> str:
    """Returns a hash of a tree's structure, shapes, types and values."""

    def leaf_digest(item: tuple) -> bytes:
        path, leaf = item
        leaf = np.ascontiguousarray(leaf)
        digest = hashlib.sha256(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf)
        return digest.digest()

    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        return hashlib.sha256(b"".join(pool.map(leaf_digest, jax.tree.leaves_with_path(params)))).hexdigest()


def _check_free_space(folder: Path, tree: Tree) -> None:
    """Refuses a tree larger than the free space: TensorStore's threads print tracebacks where it ends as they write."""
    needed, free = _num_bytes(tree), shutil.disk_usage(folder).free
    if free < needed + _ROOM_BESIDE:
        raise unusable(folder, f"a disk with {(needed + _ROOM_BESIDE) / 1e6:.0f} MB free", f"{free / 1e6:.0f} MB")


def _num_bytes(tree: Tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _member(stacked: Tree, index: int) -> Tree:
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def _read_manifest(folder: Path) -> StoreManifest | None:
    if not (folder / _MANIFEST).is_file():
        return None
    try:
        manifest = StoreManifest.model_validate(read_json(folder / _MANIFEST))
    except (pydantic.ValidationError, InputError):
        return None
    return manifest if manifest.sha256 == manifest.content_sha256() else None


def _read_part(path: Path, sha256: str | None) -> Tree | None:
    try:
        params = load_tree(path / "params")
    except Exception:  # Orbax and TensorStore raise many kinds for a damaged store
        return None
    return params if tree_sha256(params) == sha256 else None
