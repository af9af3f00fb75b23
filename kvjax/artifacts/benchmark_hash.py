"""Hashes a benchmark: one hash names its metadata and the records of all its splits in everything built from it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from kvjax.artifacts.files import HashedFile, digest, file_sha256
from kvjax.artifacts.layout import BenchmarkLayout
from kvjax.config.json_text import parse_json


@dataclasses.dataclass(frozen=True)
class BenchmarkHashes:
    """The hashes by which results may name a benchmark.

    Attributes:
      sha256: covers the metadata and every split. If the metadata records the hash of each split's file, it is the hash
        of the metadata; reading a split compares the file with it. Otherwise the files themselves are hashed too.
      earlier: the hash of the metadata as earlier versions wrote it, without hashes of splits. Results of those
        versions name the benchmark by it.
    """

    sha256: str
    earlier: str

    @classmethod
    def of(cls, path: Path) -> BenchmarkHashes:
        """Hashes the benchmark in a directory.

        Raises:
          InputError: its metadata cannot be read.
        """
        layout = BenchmarkLayout(path)
        file = HashedFile.read(layout.metadata, "the metadata of a benchmark")
        metadata = parse_json(file.content, layout.metadata, "a JSON file")
        splits = metadata.get("splits") if isinstance(metadata, dict) else None
        if not isinstance(splits, dict) or not all(isinstance(facts, dict) for facts in splits.values()):
            return cls(file.sha256, file.sha256)
        if all("sha256" in facts for facts in splits.values()):
            return cls(file.sha256, _hash_without_splits(metadata))
        files = {split: layout.split(split) for split in splits}
        hashes = {split: file_sha256(file) if file.is_file() else None for split, file in files.items()}
        return cls(digest({"metadata": file.sha256, "splits": hashes}), file.sha256)

    def names(self, recorded: object) -> bool:
        """Checks whether a recorded hash names this benchmark, by this version or an earlier one."""
        return recorded in (self.sha256, self.earlier)


def _hash_without_splits(metadata: dict[str, Any]) -> str:
    bare = copy.deepcopy(metadata)
    for facts in bare["splits"].values():
        del facts["sha256"]
    return hashlib.sha256((json.dumps(bare, indent=2) + "\n").encode()).hexdigest()
