"""Validated configurations: benchmarks and training runs.

Field names and defaults follow docs/formats.md. Configs that people write are checked strictly; a run's own
`run_config.json` may come from another trainer, so fields this project does not know are left alone there.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Literal, TypeVar

import pydantic

from kvjax.errors import InputError, unusable


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class _Recorded(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="ignore", frozen=True)


class IntRange(_Strict):
    """An inclusive range of integers, drawn from uniformly."""

    min: int = pydantic.Field(ge=0)
    max: int

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> IntRange:
        if self.max < self.min:
            raise ValueError(f"max {self.max} is below min {self.min}")
        return self

    def values(self) -> range:
        return range(self.min, self.max + 1)


class SplitConfig(_Strict):
    """How the streams of one split are drawn.

    `overwrite_count` writes follow the first write of each active key; `query_lag` bounds the number of writes between
    a read and the write it returns.
    """

    num_samples: int = pydantic.Field(ge=1)
    active_keys: IntRange
    overwrite_count: IntRange
    num_queries: IntRange
    query_lag: IntRange

    @pydantic.model_validator(mode="after")
    def _drawable(self) -> SplitConfig:
        for name, least in (("active_keys", 2), ("overwrite_count", 1), ("num_queries", 1), ("query_lag", 0)):
            if getattr(self, name).min < least:
                raise ValueError(f"{name}.min is {getattr(self, name).min}; the least that works is {least}")
        return self


class CounterfactualConfig(_Strict):
    """The split of `source_split` records with one supporting write's value changed."""

    num_samples: int = pydantic.Field(ge=1)
    source_split: Literal["validation_iid", "test_iid"] = "test_iid"


GENERATED_SPLITS = ("train", "validation_iid", "test_iid", "heldout_pairs", "structural_ood")
COUNTERFACTUAL_SPLIT = "counterfactual"
HELDOUT_SPLIT = "heldout_pairs"


class BenchmarkConfig(_Strict):
    """A symbolic key-value benchmark (docs/formats.md, "Benchmark directory")."""

    benchmark_type: Literal["symbolic_kv_stream"]
    name: str
    output_dir: str
    seed: int
    num_keys: int = pydantic.Field(ge=2)
    num_values: int = pydantic.Field(ge=2)
    holdout_answer_pair_fraction: float = pydantic.Field(gt=0.0, lt=1.0)
    heuristic_max_accuracy: float = pydantic.Field(ge=0.0, le=1.0)
    train: SplitConfig
    validation_iid: SplitConfig
    test_iid: SplitConfig
    heldout_pairs: SplitConfig
    structural_ood: SplitConfig
    counterfactual: CounterfactualConfig

    def split(self, name: str) -> SplitConfig:
        """Returns the settings of one of `GENERATED_SPLITS`."""
        return getattr(self, name)


class ModelConfig(_Recorded):
    """The transformer's shape, as a run records it."""

    d_model: int = pydantic.Field(ge=1)
    n_layers: int = pydantic.Field(ge=1)
    n_heads: int = pydantic.Field(ge=1)
    d_ff: int = pydantic.Field(ge=1)
    max_seq_len: int = pydantic.Field(ge=2)
    dropout: float = 0.0

    @pydantic.model_validator(mode="after")
    def _heads_fit(self) -> ModelConfig:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        return self


class BirthThresholds(_Recorded):
    """A metric is born where its `validation_iid` value reaches its threshold."""

    answer_accuracy: float
    q: float
    r: float
    w: float


class EvaluationConfig(_Recorded):
    """What a run evaluated while it trained."""

    batch_size: int = pydantic.Field(ge=1)
    max_eval_batches: int | None = None
    tracked_splits: tuple[str, ...] = ()
    birth_thresholds: BirthThresholds


class RunConfig(_Recorded):
    """The part of a training run's `run_config.json` that an analysis reads."""

    run_name: str
    seed: int
    benchmark_dir: str
    num_steps: int = pydantic.Field(ge=1)
    checkpoint_every_steps: int = pydantic.Field(ge=1)
    model: ModelConfig
    evaluation: EvaluationConfig

    def last_checkpoint_step(self) -> int:
        """Returns the step of the last checkpoint a finished run has."""
        return self.num_steps // self.checkpoint_every_steps * self.checkpoint_every_steps


Config = TypeVar("Config", bound=pydantic.BaseModel)


def read_config(path: Path, schema: type[Config]) -> Config:
    """Returns the config in a JSON file, validated.

    Raises:
      InputError: the file is missing, is not JSON, or does not fit the schema.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise unusable(path, f"a {schema.__name__} JSON file", "no such file") from None
    except (OSError, ValueError) as error:
        raise unusable(path, f"a {schema.__name__} JSON file", error) from None
    try:
        return schema.model_validate(document)
    except pydantic.ValidationError as error:
        raise InputError(f"{path}: {_first_problem(error)}") from None


def find_config(name: str, kind: str) -> Path:
    """Returns the path of a config given on the command line.

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


def _first_problem(error: pydantic.ValidationError) -> str:
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"]) or "the document"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] == "missing":
        return f"expected a field {field}; found none{more}"
    shown = json.dumps(problem["input"], default=str)
    found = shown if len(shown) <= 80 else shown[:77] + "..."
    return f"{field}: {problem['msg']}; found {found}{more}"
