"""The one exception that means: the input cannot be used, and here is why."""

from __future__ import annotations

from pathlib import Path


class InputError(ValueError):
    """Unusable input or flags. Commands print it as one line and exit with status 2.

    The message names the file or argument, what was expected and what was found.
    """


def unusable(where: str | Path, expected: str, found: object) -> InputError:
    """Returns an `InputError` in the one shape all of them have.

    Args:
      where: the file, or the flag or argument, that cannot be used.
      expected: what it should have held.
      found: what it holds; newlines are folded so that the message stays one line.
    """
    return InputError(f"{where}: expected {expected}; found {one_line(found)}")


def one_line(text: object) -> str:
    """Returns `text` as a single line of at most 300 characters."""
    folded = " ".join(str(text).split())
    return folded if len(folded) <= 300 else folded[:297] + "..."
