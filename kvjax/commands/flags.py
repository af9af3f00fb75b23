"""Flags made from settings, settings read from flags, and parameters in messages written as flags."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import TypeVar

from absl import flags

from kvjax.config.settings import Declared, Settings, declared
from kvjax.errors import InputError

Given = TypeVar("Given", bound=Settings)

_IN_BACKTICKS = re.compile(r"`(\w+)(=[^`]*)?`")


def flags_of(settings: Iterable[type[Settings]]) -> flags.FlagValues:
    """Makes a flag of every field of some settings classes; limits and choices are checked by the classes."""
    values = flags.FlagValues()
    for field in (field for one in settings for field in declared(one)):
        _define(field, values)
    return values


def read_settings(values: flags.FlagValues, settings: type[Given]) -> Given:
    """Makes settings of what flags were given.

    Raises:
      InputError: a required flag is missing, or a value cannot be.
    """
    return settings(**{field.name: values[field.name].value for field in declared(settings)})


def flags_for(*given: Settings) -> list[str]:
    """Writes settings as the flags that `read_settings` reads them from; those with their defaults are left out."""
    found = []
    for settings in given:
        for field in declared(type(settings)):
            value = getattr(settings, field.name)
            if value == field.default:
                continue
            if field.kind is bool and not field.many:
                found.append(f"--{'' if value else 'no'}{field.name}")
            elif field.repeated:
                found += [f"--{field.name}={member}" for member in value]
            else:
                found.append(f"--{field.name}={','.join(map(str, value)) if field.many else value}")
    return found


def help_of(settings: Iterable[type[Settings]]) -> str:
    """Explains the flags of some settings classes: names, defaults, choices and help, two lines each."""
    fields = [field for one in settings for field in declared(one)]
    names = {field.name for field in fields}
    return "\n".join(f"  --{field.name}  ({_facts(field)})\n      {with_flags(field.help, names)}" for field in fields)


def with_flags(text: str, names: Collection[str]) -> str:
    """Writes parameters in backticks, such as `steps` or `steps=150`, as the flags of those names."""

    def as_flag(match: re.Match[str]) -> str:
        return f"--{match[1]}{match[2] or ''}" if match[1] in names else match[0]

    return _IN_BACKTICKS.sub(as_flag, text)


def message_of(error: InputError, names: Collection[str]) -> str:
    """Writes an error with the names of flags in place of parameters."""
    dashes = "--" if error.parameter in names else ""
    return with_flags(f"{dashes}{error}", names)


def _define(field: Declared, values: flags.FlagValues) -> None:
    default = field.default
    if field.repeated:
        flags.DEFINE_multi_string(field.name, field.default, field.help, flag_values=values)
    elif field.many:
        listed = None if default is None else [str(member) for member in default]
        flags.DEFINE_list(field.name, listed, field.help, flag_values=values)
    elif field.kind is bool:
        flags.DEFINE_bool(field.name, default, field.help, flag_values=values)
    elif field.kind is int:
        flags.DEFINE_integer(field.name, default, field.help, flag_values=values)
    elif field.kind is float:
        flags.DEFINE_float(field.name, default, field.help, flag_values=values)
    else:
        flags.DEFINE_string(field.name, default, field.help, flag_values=values)


def _facts(field: Declared) -> str:
    if field.required:
        return "default: none; required"
    default = "none" if field.default is None else field.default
    if field.many and field.default is not None:
        default = ",".join(map(str, field.default))
    if field.kind is bool:
        default = str(field.default).lower()
    choices = f"; of {', '.join(field.choices)}" if field.choices else ""
    return f"default: {default}{choices}"
