"""Reads JSON that people and other programs wrote: what Python's parser would take in silence is refused."""

from __future__ import annotations

import contextlib
import gc
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvjax.errors import unusable

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # of UTF-8; some editors write it
_UTF_16_OR_32 = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_bytes(path: Path, expected: str) -> bytes:
    """Reads a file whole.

    Args:
      path: the file.
      expected: what it should be, for the error, as "a JSON file".

    Raises:
      InputError: there is no such file, or it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise unusable(path, expected, "no such file") from None
    except OSError as error:
        raise unusable(path, expected, error) from None


def parse_json(content: bytes, where: str | Path, expected: str) -> Any:
    """Parses a JSON document.

    Args:
      content: UTF-8 text, with or without a byte-order mark.
      where: the file, for the error.
      expected: what it should hold, for the error, as "a JSON file".

    Raises:
      InputError: it is no JSON, is nested too deeply, names a field twice, or has text that cannot be printed.
    """
    return _parse(_utf_8(content, where, expected), where, expected, _unique)


def parse_json_lines(content: bytes, path: str | Path) -> list[Any]:
    """Parses the content of a JSON-lines file, a document per line; white space at its end does not count.

    Raises:
      InputError: a line cannot be parsed, as in `parse_json`; the error names the first one.
    """
    content = _utf_8(content, path, "a JSON-lines file").rstrip()
    lines = content.split(b"\n") if content else []
    with without_garbage_collection():
        return [_parse(line, f"{path}:{number}", "a JSON object", None) for number, line in enumerate(lines, start=1)]


def _utf_8(content: bytes, where: str | Path, expected: str) -> bytes:
    if content.startswith(_UTF_16_OR_32):
        raise unusable(where, f"{expected} in UTF-8", "UTF-16 or UTF-32")
    return content.removeprefix(_BYTE_ORDER_MARK)


def _parse(content: bytes, where: str | Path, expected: str, make_object: Callable[..., Any] | None) -> Any:
    try:
        document = json.loads(content.decode(), object_pairs_hook=make_object)
        if b"\\u" in content and _SURROGATE.search(content):
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise unusable(where, f"{expected} of whole characters", r"half of a surrogate pair, such as \ud800") from None
    except UnicodeDecodeError as error:
        raise unusable(where, f"{expected} in UTF-8", error) from None
    except RecursionError:
        raise unusable(where, expected, "too many values inside one another") from None
    except ValueError as error:
        raise unusable(where, expected, error) from None
    return document


def _unique(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object of its fields; Python would keep the last of two with one name."""
    made = dict(fields)
    if len(made) != len(fields):
        names = [name for name, _ in fields]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {json.dumps(twice)} twice in one object")
    return made


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Stops the search for reference cycles while many objects without any are made: it takes half of that time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
