"""Compares all files of two folders that the same command wrote, such as with and without `--scheduler`.

    python -m benchmarks.same_files artifacts/here artifacts/on_workers

Prints how many files are equal byte for byte; equal but for the folder's name; equal in every array or tensor; equal
but for what depends on when and where they were made: times, paths, and hashes and sizes of files that hold either.
Whatever else differs is listed, with status 1. Locks, and stores of converted parameters, whose parts depend on who
converted what, are left out.
"""

from __future__ import annotations

import collections
import io
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import app

from kvjax.artifacts.differences import between_arrays, between_documents

# Fields of documents that depend on when, where and in how many calls a file was made.
_CIRCUMSTANCES = re.compile(
    r"(^|_)(sha256|seconds|date|path|paths|dir|dirs|run_dirs|checkpoint_batch|timings|device|devices|given_as"
    r"|drawn_from|file_bytes|bytes|mtime|measured_at|fingerprint)$"
)
_BYTES, _FOLDER, _ARRAYS, _FIELDS = (
    "equal byte for byte",
    "equal but for the folder's name",
    "equal in every array",
    "equal but for times, paths and hashes",
)


def main(argv: list[str]) -> None:
    first, second = map(Path, argv[1:])
    mine, theirs = _files(first), _files(second)
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    unlike = [f"{name}: in one folder only" for name in sorted(mine ^ theirs)]
    for name in sorted(mine & theirs):
        how, what = _compared(name, first, second)
        if how is None:
            unlike.append(f"{name}: {what}")
        else:
            counts[how][re.sub(r"\d+", "*", Path(name).name)] += 1
    for how in (_BYTES, _FOLDER, _ARRAYS, _FIELDS):
        names = ", ".join(f"{name} ({count})" for name, count in counts[how].most_common(12))
        print(f"{counts[how].total():6d} {how}: {names}")
    print(f"{len(unlike):6d} unlike", *unlike, sep="\n  ")
    if unlike:
        sys.exit(1)


def _files(folder: Path) -> set[str]:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if "/converted/" not in name and not name.endswith(("lock", ".lock"))}


def _compared(name: str, first: Path, second: Path) -> tuple[str | None, str]:
    """Says in which way two files are equal, or what differs."""
    mine, theirs = ((folder / name).read_bytes() for folder in (first, second))
    if mine == theirs:
        return _BYTES, ""
    renamed = theirs.replace(bytes(second.resolve()), bytes(first.resolve())).replace(bytes(second), bytes(first))
    if mine == renamed:
        return _FOLDER, ""
    if zipfile.is_zipfile(io.BytesIO(mine)):
        arrays = _tensors if name.endswith(".pt") else _arrays
        apart = between_arrays(arrays(mine), arrays(theirs), where="")
        return (_ARRAYS, "") if apart.size == 0 else (None, f"{apart.where} by {apart.size:.1e}")
    try:
        documents = [
            [json.loads(line) for line in (one.splitlines() if name.endswith(".jsonl") else [one])]
            for one in (mine, renamed)
        ]
    except ValueError:
        return None, "other bytes"
    apart = between_documents(*(_bare(one) for one in documents), where="")
    return (_FIELDS, "") if apart.size == 0 else (None, f"{apart.where} by {apart.size:.1e}")


def _bare(document: Any) -> Any:
    """Drops the fields of a document that depend on circumstances."""
    if isinstance(document, dict):
        return {name: _bare(value) for name, value in document.items() if not _CIRCUMSTANCES.search(name)}
    return [_bare(value) for value in document] if isinstance(document, list) else document


def _arrays(content: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(content)) as arrays:
        return {name: arrays[name] for name in arrays.files if name != "info"}


def _tensors(content: bytes) -> dict[str, np.ndarray]:
    import torch

    found: dict[str, np.ndarray] = {}

    def collect(value: Any, where: str) -> None:
        if isinstance(value, torch.Tensor):
            found[where] = value.numpy()
        elif isinstance(value, dict):
            for name, part in value.items():
                collect(part, f"{where}/{name}")

    collect(torch.load(io.BytesIO(content), weights_only=True), "")
    return found


if __name__ == "__main__":
    app.run(main)
