"""The one exception that says: this input cannot be used, and why; and the one way to say what is odd but usable."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pydantic


_LISTED = 5  # names of what was refused


class InputError(ValueError):
    """A file or an argument that cannot be used. Commands print it as one line and exit with status 2.

    The message names the file or argument, what was expected and what was found. It writes parameters in backticks, as
    in "(or `overwrite`)"; commands print those as flags.

    Attributes:
      parameter: the argument that cannot be used; None if a file is at fault.
    """

    def __init__(self, message: str, *, parameter: str | None = None):
        super().__init__(message)
        self.parameter = parameter


class Note(UserWarning):
    """A sentence about odd input that a call goes on with. Commands print it as a line on standard error."""


def note(sentence: str) -> None:
    """Warns about odd input that is usable, in one line that names it.

    Notes about results go into the results (`sweep.json`, tables); these are about how a call was made.
    """
    warnings.warn(visible(sentence), Note, stacklevel=2)


def unusable(where: str | Path, expected: str, found: object) -> InputError:
    """Makes the `InputError` about a file, in the one shape that all of them have.

    Args:
      where: the file, or the place in it.
      expected: what it should hold, with the remedy.
      found: what it holds; newlines are folded so that the message stays one line.
    """
    return InputError(f"{where}: expected {expected}; found {one_line(found)}")


def misfit(where: str | Path, error: pydantic.ValidationError, expected: str | None = None) -> InputError:
    """Makes the `InputError` about a document that does not fit its schema: the first field that does not, and why.

    Args:
      where: the file, or the place in it.
      error: what validation found.
      expected: what the file should be, with the remedy; None if a person wrote the file and can mend the field.
    """
    problem = error.errors()[0]
    field = one_line(".".join(map(str, problem["loc"])) or "the document")
    missing, message = problem["type"] == "missing", one_line(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "model_type":
        message = "expected an object with fields"
    if expected is not None:
        return unusable(where, expected, f"no field {field}" if missing else f"{field}: {message}")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if missing:
        return unusable(where, f"a field {field}", f"none{more}")
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):
        # Of several fields, which the message names with what it found.
        return InputError(f"{where}: {field}: {message}{more}" if problem["loc"] else f"{where}: {message}")
    shown = json.dumps(problem["input"], default=str)
    found = shown if len(shown) <= 80 else shown[:77] + "..."
    return InputError(f"{where}: {field}: {message}; found {visible(found)}{more}")


def bad_argument(parameter: str, expected: str, found: object) -> InputError:
    """Makes the `InputError` about an argument; a command prints it under the flag of that name."""
    return InputError(f"{parameter}: expected {expected}; found {one_line(found)}", parameter=parameter)


def first_refusal(refused: Sequence[tuple[str, InputError]], total: int) -> InputError:
    """Makes one `InputError` of several: the first, with the names of what else was refused.

    Args:
      refused: what was refused, and why; at least one.
      total: how many there were.
    """
    (subject, first), *others = refused
    names = [name for name in dict.fromkeys(other for other, _ in others) if name != subject]
    if not names:
        return first
    listed = ", ".join(names[:_LISTED]) + (", …" if names[_LISTED:] else "")
    more = f" ({len(refused)} of {total} were refused, also {shortened(listed, 500)})"
    return InputError(f"{first}{more}", parameter=first.parameter)


def command(name: str, **flags: Any) -> str:
    """Writes a command as a shell takes it: paths are quoted, lists joined by commas, True is a bare flag.

    Flags that are None or False are left out. If a member of a list has a comma, the flag is repeated for each.
    """
    words = ["kvjax", name]
    for flag, value in flags.items():
        if value is True:
            words.append(f"--{flag}")
        elif value is not None and value is not False:
            members = [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]
            joined = [",".join(members)] if not any("," in member for member in members) else members
            words += [f"--{flag}={shlex.quote(text)}" for text in joined]
    return " ".join(words)


def one_line(text: object) -> str:
    """Folds a text into a single line of at most 300 characters, control characters made visible."""
    try:
        folded = visible(" ".join(str(text).split()))
    except ValueError:
        return "a number of thousands of digits"  # which Python does not write
    return shortened(folded, 300)


def short_name(name: str) -> str:
    """Folds and shortens a name from a file, which may be anything, to what a line has room for."""
    return shortened(one_line(name), 100)


def shortened(text: str, longest: int) -> str:
    """Cuts a text to its first `longest` characters, the last three dots if any are missing."""
    return text if len(text) <= longest else text[: longest - 3] + "..."


def visible(text: str) -> str:
    """Writes control characters as escapes such as `\\x1b`, so that text of a file cannot steer a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
