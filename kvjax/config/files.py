"""Finds and reads config files; configs that people write are checked strictly."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TypeVar

import pydantic

from kvjax.config.json_text import parse_json, read_bytes
from kvjax.errors import misfit, unusable

Config = TypeVar("Config", bound=pydantic.BaseModel)


def read_config(path: Path, schema: type[Config], *, recorded: bool = False) -> Config:
    """Reads the config in a JSON file and validates it.

    Args:
      path: the file.
      schema: the config's type.
      recorded: the file is a run's record of itself, perhaps by another trainer; unknown fields are ignored.

    Raises:
      InputError: the file is missing, is not JSON, or does not fit the schema.
    """
    expected = f"a {schema.__name__} JSON file"
    document = parse_json(read_bytes(path, expected), path, expected)
    try:
        return schema.model_validate(document, extra="ignore" if recorded else "forbid")
    except pydantic.ValidationError as error:
        raise misfit(path, error) from None


def find_config(name: str, kind: str) -> Path:
    """Finds the file of a config given on the command line.

    A path that exists wins; otherwise the configs shipped inside the package are searched by name.

    Args:
      name: a path, or a shipped config's name such as `symbolic_kv_base` (with or without folder and `.json`).
      kind: the shipped folder to search: `benchmark`, `train`, …

    Raises:
      InputError: neither exists; the message lists the shipped names.
    """
    given = Path(name)
    if given.is_file():
        return given
    shipped = Path(str(resources.files("kvjax.configs") / kind))
    candidate = shipped / f"{given.stem}.json"
    if candidate.is_file() and str(given.with_suffix("")) in (
        given.stem,
        f"{kind}/{given.stem}",
        f"configs/{kind}/{given.stem}",
    ):
        return candidate
    names = ", ".join(sorted(path.stem for path in shipped.glob("*.json"))) or "none"
    raise unusable(name, f"a {kind} config file, or the name of a shipped one ({names})", "no such file")
