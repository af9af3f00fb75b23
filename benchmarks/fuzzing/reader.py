"""Defines what fuzzing needs to know of a reader, makes its damaged inputs, and judges what came out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from kvjax.errors import InputError

Damage = Callable[[random.Random, bytes], bytes]


@dataclasses.dataclass(frozen=True)
class Reader:
    """One kind of file and the code that reads it.

    Attributes:
      what: what is damaged, for the table.
      files: paths below the material's folder, one of which is damaged.
      damages: how; one is chosen.
      read: reads everything that a command reads from the file and returns it; gets the material's folder and the file.
      changed: what an accepted value that differs from the sound file's means, for the table.
      check: returns what is wrong with an accepted value that differs; None if every such value is a defect.
      names: names that a refusal may give beside the file's: those of files that are read together with it.
      share: of the inputs, beside other readers'.
    """

    what: str
    files: Sequence[str]
    damages: Sequence[Damage]
    read: Callable[[Path, Path], Any]
    changed: str
    check: Callable[[Any, Any, Path], str | None] | None = None
    names: Sequence[str] = ()
    share: float = 1.0


def damaged(reader: Reader, name: str, index: int, seed: int, sound: Mapping[str, bytes]) -> tuple[str, bytes]:
    """Makes the damaged input of a number: the file it stands for, and its bytes. The same arguments give the same."""
    rng = random.Random(f"{seed}/{name}/{index}")
    file = reader.files[index % len(reader.files)]
    return file, rng.choice(reader.damages)(rng, sound[file])


def fingerprint(value: Any) -> str:
    """Hashes nested values, so that two are equal if and only if their fingerprints are; NaN equals itself."""
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, pydantic.BaseModel):
        value = value.model_dump()
    elif dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping | list | tuple):
        try:
            yield json.dumps(value, sort_keys=True).encode()  # most values, and much faster than what follows
            return
        except (TypeError, ValueError, RecursionError):
            entries = sorted(value.items(), key=_key_shown) if isinstance(value, Mapping) else enumerate(value)
        yield f"{type(value).__name__}{len(value)}".encode()
        for key, part in entries:
            yield repr(key).encode("utf-8", "backslashreplace")
            yield from _parts(part)
    elif isinstance(value, set | frozenset):
        yield from _parts(sorted(value, key=repr))
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, os.PathLike):
        yield Path(value).name.encode()
    else:
        yield f"{type(value).__name__} {value!r} ".encode("utf-8", "backslashreplace")


def _key_shown(item: tuple[Any, Any]) -> str:
    return repr(item[0])


def refusal_problem(error: InputError, reader: Reader, file: Path) -> str | None:
    """Says what is wrong with a refusal: it has to be one line that names the file."""
    text = str(error)
    if len(text.splitlines()) != 1 or any(ord(character) < 32 for character in text):
        return f"not one printable line: {text!r}"
    if not any(name in text for name in (file.name, *reader.names)):
        return f"the file is not named: {text}"
    return None
