"""Damages files as disks, editors and other programs do: bytes, JSON values, and the document of a `.pt` file."""

from __future__ import annotations

import argparse
import datetime
import functools
import io
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch

# JSON that Python's writer cannot or will not write, put in place of a marker.
_RAW = (
    "NaN",
    "-Infinity",
    "1e999",
    "1" + "0" * 400,
    "1" + "0" * 5000,
    "-0",
    "1.0",
    "1e3",
    "1E-400",
    "01",
    "tru",
    "[" * 3000 + "]" * 3000,
    '"\\ud800"',
    '"\\u0000"',
)
_VALUES = (
    *(None, True, False, 0, 1, -1, 2, 7, 0.5, -0.25, 1e308, 2**31, 2**53 + 1, 2**63, 2**64, 10**30),
    *("", "x", "1", "W", "K00", "V000", "K00:V000", "train", "all", "nan", "../x", "/", "\x1b[31m", "é", "y" * 3000),
    *([], {}, [0], [None], {"": 0}, [[]], {"x": {"x": 1}}, ["W", "R"]),
)
_BLOCKS = (b"", b"\0", b"\xff", b"\n", b"{", b"}", b"]", b",", b'"', b"\\", b"\xef\xbb\xbf", b"NaN", b"null", b"-")


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
    """Changes, removes, repeats or inserts bytes, once or a few times."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        content = rng.choice(_BYTE_EDITS)(rng, content)
    return content


def damage_json(rng: random.Random, content: bytes) -> bytes:
    """Changes the structure of a JSON document."""
    return _written(_edited(rng, json.loads(content)), rng)


def damage_json_lines(rng: random.Random, content: bytes) -> bytes:
    """Changes one document of a JSON-lines file, or drops, repeats or moves lines."""
    lines = content.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    edit = rng.random()
    if edit < 0.8:
        lines[at] = _written(_edited(rng, json.loads(lines[at])), rng) + b"\n"
    elif edit < 0.85:
        del lines[at]
    elif edit < 0.9:
        lines.insert(rng.randrange(len(lines)), lines[at])
    elif edit < 0.95:
        other = rng.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    else:
        lines.insert(at, rng.choice((b"\n", b"null\n", b"[]\n", b"{}\n", b" \n", b"0\n")))
    return b"".join(lines)


def damage_checkpoint(rng: random.Random, content: bytes) -> bytes:
    """Changes a value, a name or a tensor in the document of a `.pt` file, and saves it again as PyTorch does."""
    document = _containers_copied(_loaded(content))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        document = _edited(rng, document, leaf=_other_object)
    saved = io.BytesIO()
    torch.save(document, saved)
    return saved.getvalue()


@functools.lru_cache(maxsize=4)
def _loaded(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)


def _containers_copied(document: Any) -> Any:
    """Copies the mappings and lists of a document, which edits change; no edit changes a tensor in place."""
    if isinstance(document, dict):
        return {key: _containers_copied(part) for key, part in document.items()}
    return [_containers_copied(part) for part in document] if isinstance(document, list) else document


def _flip(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(rng: random.Random, content: bytes) -> bytes:
    start, length = _stretch(rng, content)
    filler = rng.choice((b"\0" * length, b"\xff" * length, rng.randbytes(length)))
    return content[:start] + filler + content[start + length :]


def _remove(rng: random.Random, content: bytes) -> bytes:
    start, length = _stretch(rng, content)
    return content[:start] + content[start + length :]


def _repeat(rng: random.Random, content: bytes) -> bytes:
    start, length = _stretch(rng, content)
    return content[: start + length] + content[start:]


def _exchange(rng: random.Random, content: bytes) -> bytes:
    start, length = _stretch(rng, content)
    other = rng.randrange(len(content) + 1)
    low, high = sorted((start, other))
    length = min(length, high - low, len(content) - high)
    a, b = content[low : low + length], content[high : high + length]
    return content[:low] + b + content[low + length : high] + a + content[high + length :]


def _cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.choice((0, rng.randrange(len(content) + 1), max(0, len(content) - rng.randrange(1, 40))))]


def _insert(rng: random.Random, content: bytes) -> bytes:
    at = rng.choice((0, len(content), rng.randrange(len(content) + 1)))
    return content[:at] + rng.choice((*_BLOCKS, rng.randbytes(rng.randrange(1, 64)))) + content[at:]


def _other_digit(rng: random.Random, content: bytes) -> bytes:
    """Changes a digit or a letter to another: what no syntax can tell."""
    if not (places := [rng.randrange(len(content)) for _ in range(64)] if content else []):
        return content
    at = next((at for at in places if chr(content[at]).isalnum() and content[at] < 128), places[0])
    other = rng.choice(b"0123456789abcdefWRKV.-eE")
    return content[:at] + bytes([other]) + content[at + 1 :]


def _stretch(rng: random.Random, content: bytes) -> tuple[int, int]:
    start = rng.randrange(len(content) + 1)
    return start, min(rng.choice((1, 2, 4, 16, 512, 4096)), len(content) - start)


_BYTE_EDITS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _flip,
    _flip,
    _overwrite,
    _remove,
    _repeat,
    _exchange,
    _cut,
    _insert,
    _other_digit,
    _other_digit,
)


def _edited(rng: random.Random, document: Any, leaf: Callable[[random.Random, Any], Any] | None = None) -> Any:
    """Makes one edit somewhere in a nested document, which may be changed in place."""
    leaf = leaf or _other_value
    at = document
    while isinstance(at, dict | list) and at:
        keys = list(at) if isinstance(at, dict) else range(len(at))
        key = rng.choice(keys)
        if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.85:
            at = at[key]
            continue
        edit = rng.random()
        if edit < 0.6:
            at[key] = leaf(rng, at[key])
        elif edit < 0.75:
            del at[key]
        elif edit < 0.85:
            other = rng.choice(keys)
            at[key], at[other] = at[other], at[key]
        elif isinstance(at, list):
            at.insert(rng.randrange(len(at) + 1), at[key])
        else:
            at[rng.choice((f"{key}_", str(key).upper(), "", "x", f"module.{key}"))] = at.pop(key)
        return document
    return leaf(rng, document)


def _other_value(rng: random.Random, value: Any) -> Any:
    """Chooses a value near a JSON value, or of another type."""
    near: list[Any] = [[value], {"x": value}, str(value)]
    if isinstance(value, bool):
        near += [not value, int(value)]
    elif isinstance(value, int | float):
        near += [value + 1, value - 1, -value, value * 10, float(value) if abs(value) < 1e300 else 0, str(value)]
        near += [int(value), value / 3] if math.isfinite(value) and abs(value) < 1e300 else []
    elif isinstance(value, str):
        near += [value + "x", value[:-1], value.lower(), value[::-1], f" {value}"]
    elif isinstance(value, list):
        near += [value[:1], value * 2, value[::-1]]
    raw = f"@raw{rng.randrange(len(_RAW))}@"
    return rng.choice((rng.choice(near), rng.choice(near), rng.choice(_VALUES), rng.choice(_VALUES), raw))


def _written(document: Any, rng: random.Random) -> bytes:
    text = json.dumps(document, indent=rng.choice((None, None, 2)))
    return re.sub(r'"@raw(\d+)@"', lambda found: _RAW[int(found[1])], text).encode()


def _other_object(rng: random.Random, value: Any) -> Any:
    """Chooses another tensor in place of a tensor, or another object that people put beside weights."""
    if isinstance(value, torch.Tensor) and rng.random() < 0.8:
        return rng.choice(_TENSOR_EDITS)(rng, value)
    if rng.random() < 0.5:
        return rng.choice(
            (
                np.float64(0.5),
                np.int64(3),
                np.float32("nan"),
                np.arange(3),
                {1, 2},
                1 + 2j,
                b"bytes",
                float("nan"),
                float("inf"),
                torch.float32,
                torch.tensor(3),
                torch.tensor(float("nan")),
                torch.Size([2]),
                PurePosixPath("runs/a"),
                argparse.Namespace(lr=0.1),
                datetime.date(2026, 1, 2),
                torch.get_rng_state()[:64].clone(),
                10**30,
                -1,
                "160",
            )
        )
    plain = _other_value(rng, value if isinstance(value, bool | int | float | str) else 1)
    return float("nan") if isinstance(plain, str) and plain.startswith("@raw") else plain


def _one_number(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone().reshape(-1)
    if changed.numel():
        value = rng.choice((float("nan"), float("inf"), -1.0, 0.0, 1e30))
        changed[rng.randrange(changed.numel())] = value if changed.is_floating_point() else 7
    return changed.reshape(tensor.shape)


_TENSOR_EDITS: tuple[Callable[[random.Random, torch.Tensor], Any], ...] = (
    _one_number,
    lambda rng, t: t.double(),
    lambda rng, t: t.half(),
    lambda rng, t: t.bfloat16(),
    lambda rng, t: t.to(rng.choice((torch.int64, torch.int8, torch.bool, torch.complex64))),
    lambda rng, t: t.t().contiguous() if t.ndim == 2 else t[None],
    lambda rng, t: t.t() if t.ndim == 2 else t.flip(0) if t.ndim else t,
    lambda rng, t: t[:-1] if t.ndim and len(t) else t[None],
    lambda rng, t: t.reshape(-1),
    lambda rng, t: t[:0] if t.ndim else t,
    lambda rng, t: t[:1].expand(t.shape) if t.ndim and len(t) else t,
    lambda rng, t: torch.zeros(1).expand(3000, 3000),
    lambda rng, t: torch.nn.Parameter(t.float()),
    lambda rng, t: t.to_sparse() if t.ndim else t,
    lambda rng, t: t.tolist() if t.numel() < 100 else t.numpy(),
    lambda rng, t: torch.cat([t, t]) if t.ndim else t,
    lambda rng, t: torch.zeros_like(t),
)
