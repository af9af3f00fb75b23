"""Flags of commands: how parameters in a library's messages are written on the command line."""

from __future__ import annotations

import re
from collections.abc import Collection

from kvjax.errors import InputError

_IN_BACKTICKS = re.compile(r"`(\w+)(=[^`]*)?`")


def with_flags(text: str, names: Collection[str]) -> str:
    """Writes parameters in backticks, such as `steps` or `steps=150`, as the flags of those names."""

    def as_flag(match: re.Match[str]) -> str:
        return f"--{match[1]}{match[2] or ''}" if match[1] in names else match[0]

    return _IN_BACKTICKS.sub(as_flag, text)


def message_of(error: InputError, names: Collection[str]) -> str:
    """Writes an error with the names of flags in place of parameters."""
    dashes = "--" if error.parameter in names else ""
    return with_flags(f"{dashes}{error}", names)
