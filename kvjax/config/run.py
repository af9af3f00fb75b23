"""Defines the part of a training run's `run_config.json` that an analysis reads.

The file may come from another trainer, so fields unknown here are ignored.
"""

from __future__ import annotations

import pydantic

from kvjax.config.base import Section
from kvjax.errors import short_name
from kvjax.machine import machine_memory_bytes


class ModelConfig(Section):
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

    @pydantic.model_validator(mode="after")
    def _fits_into_memory(self) -> ModelConfig:
        block = self.d_model * (4 * self.d_model + 2 * self.d_ff)
        needed, memory = 4 * (self.n_layers * block + self.max_seq_len * self.d_model), machine_memory_bytes()
        if needed > memory:
            raise ValueError(
                f"expected parameters that fit into this machine's {memory / 1e9:.0f} GB; found {needed / 1e9:.0f} GB "
                f"of n_layers {self.n_layers}, d_model {self.d_model}, d_ff {self.d_ff}, max_seq_len {self.max_seq_len}"
            )
        return self


class BirthThresholds(Section):
    """A metric is born at the checkpoint where its `validation_iid` value reaches its threshold.

    A metric without one, as other trainers record none, has no birth. Held-out accuracy, on `heldout_pairs`, has a
    default, because recorded configs do not know it: halfway between chance and 1, for pairs never answered in training
    are either looked up or not. `q` has none: the key of a read stands at p_e itself, so q is self-attention and no
    sign of lookup.
    """

    answer_accuracy: float | None = None
    heldout_answer_accuracy: float | None = pydantic.Field(default=0.5, ge=0.0, le=1.0)
    q: float | None = None
    r: float | None = None
    w: float | None = None


class Stabilization(Section):
    """From which checkpoint on a run's measures count as stable (docs/definitions.md, "Dynamics")."""

    residual_drift: float = pydantic.Field(
        default=0.05,
        gt=0.0,
        description="Largest drift of any stage's mean state at p_e that is stable, per 1000 training steps.",
    )
    head_rank_correlation: float = pydantic.Field(
        default=0.8,
        ge=-1.0,
        le=1.0,
        description="Smallest rank correlation of the heads' accuracy drops with the previous checkpoint's.",
    )


class EvaluationConfig(Section):
    """The evaluations a run makes while it trains, and its thresholds of birth and stability."""

    batch_size: int = pydantic.Field(ge=1)
    max_eval_batches: int | None = pydantic.Field(default=None, ge=1)
    tracked_splits: tuple[str, ...] = ()
    birth_thresholds: BirthThresholds = BirthThresholds()
    stabilization: Stabilization = Stabilization()

    @pydantic.field_validator("birth_thresholds", mode="before")
    @classmethod
    def _none_are_none(cls, thresholds: object) -> object:
        return {} if thresholds is None else thresholds


class RunConfig(Section):
    """The part of a training run's `run_config.json` that an analysis reads."""

    run_name: str
    seed: int | None = pydantic.Field(default=None, ge=0, lt=2**63)
    benchmark_dir: str
    num_steps: int = pydantic.Field(ge=1)
    checkpoint_every_steps: int = pydantic.Field(ge=1)
    model: ModelConfig
    evaluation: EvaluationConfig

    @property
    def title(self) -> str:
        """The run's name and seed, as they are printed."""
        return f"{short_name(self.run_name)} ({'no seed recorded' if self.seed is None else f'seed {self.seed}'})"

    @property
    def attributes(self) -> dict[str, str | int]:
        """The run's name and seed as attributes of a dataset, which cannot be null."""
        return {"run_name": self.run_name} | ({} if self.seed is None else {"seed": self.seed})
