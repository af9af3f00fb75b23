"""Defines training configs: model, optimiser, schedule, evaluation and checkpoints."""

from __future__ import annotations

from typing import Literal

import pydantic

from kvjax.config.base import Section
from kvjax.config.benchmark import IntRange
from kvjax.config.run import EvaluationConfig, ModelConfig, RunConfig


class InitializedModelConfig(ModelConfig):
    """The transformer's shape, and how its weights start: PyTorch's defaults times `init_scale`."""

    init_scale: float = pydantic.Field(default=1.0, gt=0.0)

    @pydantic.field_validator("dropout")
    @classmethod
    def _no_dropout(cls, dropout: float) -> float:
        if dropout != 0.0:
            raise ValueError("the trainer has no dropout; expected 0.0")
        return dropout


class ScheduleConfig(Section):
    """The learning rate after the warm-up. A cosine decay runs from `decay_start_step` (default: the end of the
    warm-up) to `decay_end_step` (default: the last step), down to `min_learning_rate` (default: 0)."""

    kind: Literal["constant", "cosine_decay"] = "constant"
    decay_start_step: int | None = None
    decay_end_step: int | None = None
    min_learning_rate: float | None = None


class OptimizationConfig(Section):
    """AdamW as PyTorch defines it, with clipping by global norm (none if `grad_clip_norm` is null)."""

    learning_rate: float = pydantic.Field(gt=0.0)
    weight_decay: float = pydantic.Field(ge=0.0)
    beta1: float = pydantic.Field(ge=0.0, lt=1.0)
    beta2: float = pydantic.Field(ge=0.0, lt=1.0)
    eps: float = pydantic.Field(default=1e-8, gt=0.0)
    grad_clip_norm: float | None = pydantic.Field(default=None, gt=0.0)
    warmup_steps: int = pydantic.Field(default=0, ge=0)
    schedule: ScheduleConfig = ScheduleConfig()

    @pydantic.model_validator(mode="after")
    def _decays(self) -> OptimizationConfig:
        schedule = self.schedule
        start = schedule.decay_start_step if schedule.decay_start_step is not None else self.warmup_steps
        if schedule.decay_end_step is not None and schedule.decay_end_step <= start:
            raise ValueError(f"decay_end_step {schedule.decay_end_step} is not after the decay's start at {start}")
        if not 0.0 <= (schedule.min_learning_rate or 0.0) <= self.learning_rate:
            raise ValueError(f"min_learning_rate {schedule.min_learning_rate} is not between 0 and learning_rate")
        return self


class TrainingEvaluationConfig(EvaluationConfig):
    """The evaluations while training. Older configs may hold `max_analysis_batches` and `analysis_splits`, which are
    ignored: the sweep analyses."""

    max_analysis_batches: int | None = None
    analysis_splits: tuple[str, ...] = ()

    @pydantic.model_validator(mode="after")
    def _tracks_something(self) -> TrainingEvaluationConfig:
        if not self.tracked_splits:
            raise ValueError("tracked_splits names no split")
        return self


class CheckpointingConfig(Section):
    """Which checkpoints are saved, and by which metric one is the best."""

    save_step_checkpoints: bool = True
    save_best_checkpoint: bool = True
    best_checkpoint_split: str
    best_checkpoint_metric: Literal["answer_accuracy", "token_accuracy", "loss"] = "answer_accuracy"
    best_checkpoint_maximize: bool = True


CURRICULUM_AXES = ("active_keys", "overwrite_count", "num_queries", "query_lag")


class CurriculumStage(Section):
    """Until which step only some of the training records are drawn: those within every range that is given.

    `query_lag` bounds the number of writes between each read of a record and the write it returns.
    """

    until_step: int = pydantic.Field(ge=1)
    active_keys: IntRange | None = None
    overwrite_count: IntRange | None = None
    num_queries: IntRange | None = None
    query_lag: IntRange | None = None

    @pydantic.model_validator(mode="after")
    def _limits_something(self) -> CurriculumStage:
        if not self.limits():
            raise ValueError(f"the stage until step {self.until_step} limits none of {', '.join(CURRICULUM_AXES)}")
        return self

    def limits(self) -> dict[str, IntRange]:
        """Returns the ranges that are given, by axis."""
        given = {axis: getattr(self, axis) for axis in CURRICULUM_AXES}
        return {axis: limits for axis, limits in given.items() if limits is not None}


class TrainConfig(RunConfig):
    """A training run. Older configs may hold `device` and `num_workers`, which are ignored: JAX picks the device."""

    seed: int = pydantic.Field(ge=0, lt=2**32)  # JAX keys hold no more
    device: str = "auto"
    output_dir: str
    batch_size: int = pydantic.Field(ge=1, le=1_000_000)
    log_every_steps: int = pydantic.Field(ge=1)
    eval_every_steps: int = pydantic.Field(ge=1)
    num_workers: int = 0
    model: InitializedModelConfig
    optimization: OptimizationConfig
    evaluation: TrainingEvaluationConfig
    checkpointing: CheckpointingConfig
    curriculum: tuple[CurriculumStage, ...] = ()

    @pydantic.model_validator(mode="after")
    def _stages_follow_each_other(self) -> TrainConfig:
        ends = [stage.until_step for stage in self.curriculum]
        if ends != sorted(set(ends)):
            raise ValueError(f"curriculum: expected stages by ascending until_step; found {ends}")
        return self

    @pydantic.model_validator(mode="after")
    def _best_is_tracked(self) -> TrainConfig:
        split = self.checkpointing.best_checkpoint_split
        if self.checkpointing.save_best_checkpoint and split not in self.evaluation.tracked_splits:
            raise ValueError(f"best_checkpoint_split {split} is not among evaluation.tracked_splits")
        return self
