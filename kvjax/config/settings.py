"""Settings that people choose: each field says its type, default, help and limits once, for Python and for flags.

Nothing heavy is imported here or by modules of settings, so that a command answers a wrong flag at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

from kvjax.errors import bad_argument, visible

_LONG_NUMBER = re.compile(r"\d{256}")  # no file's name is that long, and Python reads no number of 4300 digits


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    repeated: bool = False,
) -> Any:
    """Declares a field of settings with a default.

    Args:
      default: its value if none is given; None if the setting may be absent.
      help: one line for `--help`.
      choices: the values it may have, or its members for a tuple.
      minimum, maximum, above: limits of a number; NaN and infinities are refused as well.
      repeated: whether a flag of several texts is repeated; each is taken as it is, with its commas.
    """
    limits = {"minimum": minimum, "maximum": maximum, "above": above}
    return dataclasses.field(
        default=default, metadata={"help": help, "choices": tuple(choices), "repeated": repeated, **limits}
    )


def required(help: str, *, repeated: bool = False) -> Any:
    """Declares a field of settings that has no default; `repeated` as for `setting`."""
    limits = dict.fromkeys(("minimum", "maximum", "above"))
    return dataclasses.field(metadata={"help": help, "choices": (), "repeated": repeated, **limits})


@dataclasses.dataclass(frozen=True)
class Declared:
    """A field of settings, as a flag is made from it.

    Attributes:
      name: of the parameter and the flag.
      kind: `str`, `int`, `float`, `bool`, or a class that parses texts; of a tuple, its members' type.
      many: whether it is a tuple.
      default: None if it has none.
      required: whether a value has to be given.
      help, choices, minimum, maximum, above, repeated: see `setting`.
    """

    name: str
    kind: type
    many: bool
    default: Any
    required: bool
    help: str
    choices: tuple[str, ...]
    minimum: float | None
    maximum: float | None
    above: float | None
    repeated: bool


@functools.cache
def declared(settings: type) -> list[Declared]:
    """Lists the fields of a settings class, in order."""
    hints, found = typing.get_type_hints(settings), []
    for field in dataclasses.fields(settings):
        kind, many = _kind(hints[field.name])
        missing = field.default is dataclasses.MISSING
        found.append(Declared(field.name, kind, many, None if missing else field.default, missing, **field.metadata))
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The base of settings: checks every field when it is made, and brings it into its type.

    Texts with commas and lists become tuples; an empty text or list of an optional setting becomes None.

    Raises:
      InputError: a value is missing, of another type, no choice, or beyond a limit.
    """

    def __post_init__(self) -> None:
        for field in declared(type(self)):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))


def _kind(hint: Any) -> tuple[type, bool]:
    """Reads an annotation such as `tuple[int, ...] | None`: the type of the value or of its members, and if many."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    first = next(option for option in options if option is not types.NoneType)
    if typing.get_origin(first) is tuple:
        return typing.get_args(first)[0], True
    return first, False


def _checked(field: Declared, value: Any) -> Any:
    if field.many:
        value = ([value] if field.repeated else value.split(",")) if isinstance(value, str) else value
        value = None if value is None else tuple(member for member in value if not field.repeated or member)
    empty = value is None or (isinstance(value, str | tuple) and not value)
    if empty and field.required:
        raise bad_argument(field.name, "a value", f"none ({field.help})")
    if value is None and field.default is None:
        return None
    if empty and field.default is None and field.kind is str:
        return None
    if not field.many:
        return _checked_one(field, value)
    if field.kind is int:
        return _different_numbers(field, value)
    members = tuple(_checked_one(field, member) for member in value)
    return tuple(choice for choice in field.choices if choice in members) if field.choices else members


def _checked_one(field: Declared, value: Any) -> Any:
    if field.choices and value not in field.choices:
        expected = f"{field.name} among" if field.many else "one of"
        raise bad_argument(field.name, f"{expected} {', '.join(field.choices)}", value)
    if isinstance(value, str) and _LONG_NUMBER.search(value):
        raise bad_argument(field.name, "numbers of fewer than 256 digits", value)
    if isinstance(value, str) and (parse := getattr(field.kind, "parse", None)):
        return parse(value, field.name)
    if field.kind not in (int, float):
        return value
    whole = field.kind is int
    right = isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)
    if not (right and _is_finite(value, field.kind) and _within(field, value)):
        raise bad_argument(field.name, _in_words(field), value)
    return field.kind(value)


def _is_finite(value: float, kind: type) -> bool:
    try:
        return kind is int or math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


def _within(field: Declared, value: float) -> bool:
    return (
        (field.minimum is None or value >= field.minimum)
        and (field.maximum is None or value <= field.maximum)
        and (field.above is None or value > field.above)
    )


def _in_words(field: Declared) -> str:
    noun = "a whole number" if field.kind is int else "a number"
    if field.above is not None:
        return f"{noun} above {field.above}"
    if field.minimum is not None and field.maximum is not None:
        return f"{noun} from {field.minimum} to {field.maximum}"
    return noun if field.minimum is None else f"{noun} of at least {field.minimum}"


def _different_numbers(field: Declared, values: Sequence[Any]) -> tuple[int, ...]:
    texts = [str(value).strip() for value in values]
    good = texts and all(text.isdecimal() and len(text) <= 10 and int(text) < 2**32 for text in texts)
    if not good or len({int(text) for text in texts}) != len(texts):
        raise bad_argument(field.name, "different whole numbers, such as 7,11,13", visible(",".join(texts)) or "none")
    return tuple(map(int, texts))
