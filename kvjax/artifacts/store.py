"""Converted parameters of a run's checkpoints, stacked, in an Orbax store with a manifest that says what they are."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pydantic

from kvjax.artifacts.files import read_json, replace_directory, write_json
from kvjax.config import ModelConfig
from kvjax.errors import unusable

_MANIFEST = "manifest.json"
_PARAMS = "params"

Tree = dict[str, Any]


class StoredCheckpoint(pydantic.BaseModel):
    """One checkpoint of the store."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    step: int
    file: str
    sha256: str
    certificate: dict[str, Any] | None
    metrics: dict[str, Any]


class StoreManifest(pydantic.BaseModel):
    """What a store holds; `checkpoints` are in the order of the parameters' leading axis."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    kvjax_parameter_store: Literal[1]
    run_name: str
    model: ModelConfig
    vocab_size: int
    checkpoints: list[StoredCheckpoint]
    recorded_config: dict[str, Any]
    params_sha256: str


@dataclasses.dataclass(frozen=True)
class ParameterStore:
    """An opened store.

    Attributes:
      manifest: what it holds.
      params: numpy parameter tree, every leaf with a leading checkpoint axis C.
    """

    manifest: StoreManifest
    params: Tree

    def checkpoint(self, index: int) -> Tree:
        """Returns the parameters of one checkpoint."""
        return jax.tree.map(lambda leaf: leaf[index], self.params)


def write_store(
    folder: Path,
    params: Tree,
    *,
    run_name: str,
    model: ModelConfig,
    vocab_size: int,
    checkpoints: list[StoredCheckpoint],
    recorded_config: dict[str, Any],
) -> StoreManifest:
    """Writes stacked parameters and their manifest; an existing store is replaced only once the new one is whole."""
    from orbax.checkpoint import v1 as orbax  # a second to import, for nothing else in the project

    manifest = StoreManifest(
        kvjax_parameter_store=1,
        run_name=run_name,
        model=model,
        vocab_size=vocab_size,
        checkpoints=checkpoints,
        recorded_config=recorded_config,
        params_sha256=_tree_sha256(params),
    )
    with replace_directory(folder) as partial:
        orbax.save(partial.resolve() / _PARAMS, params)
        write_json(partial / _MANIFEST, manifest.model_dump())
    return manifest


def read_store(folder: Path) -> ParameterStore:
    """Returns the store in a folder.

    Raises:
      InputError: there is none, or it is damaged.
    """
    from orbax.checkpoint import v1 as orbax

    if not (folder / _MANIFEST).is_file():
        raise unusable(folder, "converted parameters (kvjax convert --to=flax)", "none")
    try:
        manifest = StoreManifest.model_validate(read_json(folder / _MANIFEST))
    except pydantic.ValidationError as error:
        raise unusable(folder / _MANIFEST, "the manifest of a parameter store", error.errors()[0]["msg"]) from None
    try:
        params = orbax.load(folder.resolve() / _PARAMS)
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged store
        raise unusable(folder, "a readable parameter store", error) from None
    if _tree_sha256(params) != manifest.params_sha256:
        raise unusable(folder, "the parameters its manifest names", "others")
    return ParameterStore(manifest, params)


def _tree_sha256(params: Tree) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(params):
        leaf = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf)
    return digest.hexdigest()
