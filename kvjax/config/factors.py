"""Defines factor screens: a base study, and factors that are varied around it one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pydantic

from kvjax.config.base import Section
from kvjax.config.benchmark import BenchmarkConfig
from kvjax.config.files import Config, find_config, read_config
from kvjax.config.train import TrainConfig
from kvjax.errors import InputError, misfit, unusable

BASE = "base"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a folder on any file system
_GIVEN_BY_THE_SCREEN = ("seed", "run_name", "output_dir", "benchmark_dir")


class Overrides(Section):
    """What differs from a base: fields of its configs by dotted name, such as `model.n_layers`."""

    train: dict[str, Any] = pydantic.Field(default_factory=dict)
    benchmark: dict[str, Any] = pydantic.Field(default_factory=dict)


class FactorValue(Overrides):
    """A value of a factor beside the base's own."""

    label: str

    @pydantic.field_validator("label")
    @classmethod
    def _names_a_folder(cls, label: str) -> str:
        return _folder_name(label)

    @pydantic.model_validator(mode="after")
    def _differs(self) -> Self:
        if not self.train and not self.benchmark:
            raise ValueError(f"the value {self.label} overrides nothing; expected fields under train or benchmark")
        return self


class Factor(Section):
    """A factor: what the base's value of it is called, and the other values."""

    name: str
    base_label: str
    values: tuple[FactorValue, ...] = pydantic.Field(min_length=1)

    @pydantic.field_validator("name", "base_label")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        return _folder_name(name)

    @pydantic.model_validator(mode="after")
    def _has_values_of_its_own(self) -> Self:
        _no_repeats("the labels of a factor's values", [self.base_label, *(value.label for value in self.values)])
        return self


class FactorScreenConfig(Section):
    """A screen: every factor is varied around one base, seeds and all else being equal."""

    name: str
    train_config: str
    benchmark_config: str
    base: Overrides = Overrides()
    seeds: tuple[int, ...] = pydantic.Field(min_length=1)
    output_dir: str
    factors: tuple[Factor, ...] = pydantic.Field(min_length=1)

    @pydantic.model_validator(mode="after")
    def _names_differ(self) -> Self:
        _no_repeats("the names of factors", [BASE, *(factor.name for factor in self.factors)])
        _no_repeats("seeds", self.seeds)
        return self


def _folder_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("expected letters, digits, dots, dashes and underscores, the name of a folder")
    return name


def _no_repeats(what: str, names: Sequence[Any]) -> None:
    repeated = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if repeated is not None:
        raise ValueError(f"{what}: expected different ones; found {repeated} twice")


def overridden(config: Config, overrides: Mapping[str, Any], where: str | Path) -> Config:
    """Sets fields of a config and validates it again.

    Args:
      config: the config.
      overrides: dotted field -> value.
      where: what the overrides came from, for messages.

    Raises:
      InputError: there is no such field, the screen itself gives it, or the config cannot hold the value.
    """
    document = config.model_dump(mode="json")
    for field, value in overrides.items():
        *sections, name = field.split(".")
        section: Any = document
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or name not in section:
            expected = f"fields of a {type(config).__name__}, with dots between sections"
            raise unusable(where, expected, field)
        if field in _GIVEN_BY_THE_SCREEN:
            raise unusable(where, "factors that vary other fields; the screen sets this one for every run", field)
        section[name] = value
    try:
        return type(config).model_validate(document, extra="forbid")
    except pydantic.ValidationError as error:
        raise misfit(where, error) from None


def overrides_in_words(overrides: Mapping[str, Any]) -> str:
    """Writes the fields that a setting sets, as JSON; `the base` for none."""
    return ", ".join(f"{field} = {json.dumps(value)}" for field, value in overrides.items()) or "the base"


def base_configs(screen: FactorScreenConfig, source: Path) -> tuple[TrainConfig, BenchmarkConfig]:
    """Reads the two configs that a screen varies, with the overrides of its base.

    Configs are looked for beside the screen's own file first, then where commands look for them.

    Raises:
      InputError: one is missing or cannot be used.
    """
    train = read_config(_find(screen.train_config, "train", source), TrainConfig)
    benchmark = read_config(_find(screen.benchmark_config, "benchmark", source), BenchmarkConfig)
    where = f"{source}: base"
    return overridden(train, screen.base.train, where), overridden(benchmark, screen.base.benchmark, where)


def _find(name: str, kind: str, source: Path) -> Path:
    beside = source.parent / name
    try:
        return beside if beside.is_file() else find_config(name, kind)
    except InputError as error:
        raise unusable(source, f"{kind}_config to name one", str(error)) from None
