"""Defines training configs: model, optimiser, schedule, evaluation and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic_core import InitErrorDetails, PydanticCustomError

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


class _Decaying(Section):
    """What the settings of every optimiser have in common; each declares its fields in the order that runs record."""

    @pydantic.model_validator(mode="after")
    def _decays(self) -> Self:
        schedule = self.schedule
        start = schedule.decay_start_step if schedule.decay_start_step is not None else self.warmup_steps
        if schedule.decay_end_step is not None and schedule.decay_end_step <= start:
            raise ValueError(f"decay_end_step {schedule.decay_end_step} is not after the decay's start at {start}")
        if not 0.0 <= (schedule.min_learning_rate or 0.0) <= self.learning_rate:
            raise ValueError(f"min_learning_rate {schedule.min_learning_rate} is not between 0 and learning_rate")
        return self


class AdamWConfig(_Decaying):
    """AdamW as PyTorch defines it, with clipping by global norm (none if `grad_clip_norm` is null)."""

    # Not recorded: it is the optimiser of every config without one, so that older runs and new ones record the same.
    optimizer: Literal["adamw"] = pydantic.Field(default="adamw", exclude=True)
    learning_rate: float = pydantic.Field(gt=0.0)
    weight_decay: float = pydantic.Field(ge=0.0)
    beta1: float = pydantic.Field(ge=0.0, lt=1.0)
    beta2: float = pydantic.Field(ge=0.0, lt=1.0)
    eps: float = pydantic.Field(default=1e-8, gt=0.0)
    grad_clip_norm: float | None = pydantic.Field(default=None, gt=0.0)
    warmup_steps: int = pydantic.Field(default=0, ge=0)
    schedule: ScheduleConfig = ScheduleConfig()

    @property
    def accumulators(self) -> tuple[str, ...]:
        """Names, as PyTorch's, what the optimiser keeps of every parameter from step to step."""
        return ("exp_avg", "exp_avg_sq")


class SGDConfig(_Decaying):
    """SGD as PyTorch defines it without dampening: weight decay is added to the clipped gradient, before momentum."""

    optimizer: Literal["sgd"]
    learning_rate: float = pydantic.Field(gt=0.0)
    weight_decay: float = pydantic.Field(ge=0.0)
    momentum: float = pydantic.Field(ge=0.0, lt=1.0)
    nesterov: bool = False
    grad_clip_norm: float | None = pydantic.Field(default=None, gt=0.0)
    warmup_steps: int = pydantic.Field(default=0, ge=0)
    schedule: ScheduleConfig = ScheduleConfig()

    @pydantic.model_validator(mode="after")
    def _momentum_to_look_ahead_with(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0; found 0")
        return self

    @property
    def accumulators(self) -> tuple[str, ...]:
        """Names, as PyTorch's, what the optimiser keeps of every parameter from step to step."""
        return ("momentum_buffer",) if self.momentum else ()


_OPTIMIZERS = {"adamw": AdamWConfig, "sgd": SGDConfig}


def _optimizer_of(settings: Any) -> str | None:
    if isinstance(settings, _Decaying):
        return settings.optimizer
    name = settings.get("optimizer", "adamw") if isinstance(settings, dict) else None
    return name if isinstance(name, str) else None


def _of_one_optimizer(settings: Any, validate: pydantic.ValidatorFunctionWrapHandler) -> Any:
    """Validates the settings of the optimiser that they name; errors name fields as the file has them."""
    try:
        return validate(settings)
    except pydantic.ValidationError as error:
        problems = [_without_tag(problem) for problem in error.errors()]
        raise pydantic.ValidationError.from_exception_data(error.title, problems) from None


def _without_tag(problem: Mapping[str, Any]) -> InitErrorDetails:
    """Takes the optimiser, which is no field, out of a problem's place; a setting of another one gets plain words."""
    kind, found, (name, *place) = problem["type"], problem["input"], problem["loc"] or (None,)
    if name is None:
        known = " or ".join(map(json.dumps, _OPTIMIZERS))
        if isinstance(found, dict):
            place, found = ["optimizer"], found["optimizer"]
        expected = f"expected {known}" if place else f"expected an object with fields, perhaps an optimizer: {known}"
        kind = PydanticCustomError("optimizer", expected)
    elif kind == "extra_forbidden" and len(place) == 1:
        others = [other for other, config in _OPTIMIZERS.items() if place[0] in config.model_fields]
        remedy = f" ({others[0]} has: set optimizer)" if others else ""
        kind = PydanticCustomError("setting", f"{name} has no such setting{remedy}")
    return {**problem, "type": kind, "loc": tuple(place), "input": found}


OptimizationConfig = Annotated[
    Annotated[AdamWConfig, pydantic.Tag("adamw")] | Annotated[SGDConfig, pydantic.Tag("sgd")],
    pydantic.Discriminator(_optimizer_of),
    pydantic.WrapValidator(_of_one_optimizer),
]


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
