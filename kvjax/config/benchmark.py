"""Defines benchmark configs: which streams each split holds."""

from __future__ import annotations

from typing import Literal

import pydantic

from kvjax.config.base import Section
from kvjax.machine import machine_memory_bytes

# What one token of a record, and one pair of a key and a value, take while a benchmark is drawn (about, from above).
_BYTES_PER_TOKEN = 400
_BYTES_PER_PAIR = 200


class IntRange(Section):
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


class SplitConfig(Section):
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

    @property
    def longest_stream(self) -> int:
        """The most tokens a stream may have: three for every write and read, and both ends."""
        return 3 * (self.active_keys.max + self.overwrite_count.max + self.num_queries.max) + 2


class CounterfactualConfig(Section):
    """The split of `source_split` records with one supporting write's value changed."""

    num_samples: int = pydantic.Field(ge=1)
    source_split: Literal["validation_iid", "test_iid"] = "test_iid"


GENERATED_SPLITS = ("train", "validation_iid", "test_iid", "heldout_pairs", "structural_ood")
COUNTERFACTUAL_SPLIT = "counterfactual"
HELDOUT_SPLIT = "heldout_pairs"


class BenchmarkConfig(Section):
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

    @pydantic.model_validator(mode="after")
    def _can_be_drawn(self) -> BenchmarkConfig:
        for name in GENERATED_SPLITS:
            writes = self.split(name).active_keys.max + self.split(name).overwrite_count.max
            if writes > self.num_values:
                raise ValueError(
                    f"{name}.overwrite_count: expected at most num_values {self.num_values} writes a stream, for each "
                    f"writes another value; found up to {writes}"
                )
        memory = machine_memory_bytes()
        sizes = {"num_keys times num_values": _BYTES_PER_PAIR * self.num_keys * self.num_values}
        longest = {name: self.split(name).longest_stream for name in GENERATED_SPLITS}
        longest[COUNTERFACTUAL_SPLIT] = longest[self.counterfactual.source_split]
        for name, tokens in longest.items():
            sizes[f"{name}.num_samples"] = _BYTES_PER_TOKEN * tokens * getattr(self, name).num_samples
        for name, needed in sizes.items():
            if needed > memory:
                raise ValueError(
                    f"{name}: expected a benchmark that fits into this machine's {memory / 1e9:.0f} GB; "
                    f"found one of about {needed / 1e9:.0f} GB"
                )
        return self

    def split(self, name: str) -> SplitConfig:
        """Looks up the settings of one of `GENERATED_SPLITS`."""
        return getattr(self, name)
