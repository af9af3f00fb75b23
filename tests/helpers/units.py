"""Units of work that go well or badly, as workers find them by name."""

from __future__ import annotations

import os
import time
from pathlib import Path

from kvjax.errors import InputError, note


def write_text(path: str, text: str) -> str:
    """Writes a file and returns the text."""
    Path(path).write_text(text)
    return text


def wait(seconds: float) -> int:
    """Waits, and returns the process that did."""
    time.sleep(seconds)
    return os.getpid()


def refuse(path: str) -> None:
    """Refuses a file, about a parameter."""
    raise InputError(f"{path}: expected a file; found none", parameter="steps")


def fail(error: Exception) -> None:
    """Raises an error that no unit should."""
    raise error


def tell(sentence: str) -> str:
    """Makes a note, and returns where it was made from."""
    note(sentence)
    return os.getcwd()


def fill_memory() -> None:
    """Takes more and more memory, slowly enough to be seen."""
    taken = []
    while True:
        taken.append(bytearray(os.urandom(1) * 50_000_000))
        time.sleep(0.1)


def write_after(begun: str, seconds: float, path: str) -> None:
    """Says that it has begun, waits, and writes a file."""
    Path(begun).touch()
    time.sleep(seconds)
    Path(path).touch()


def environment(name: str) -> str | None:
    """Returns a variable of the worker's environment."""
    return os.environ.get(name)
