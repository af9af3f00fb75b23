"""Validated configurations: benchmarks, training runs, birth windows.

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


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True)


class IntRange(_Section):
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


class SplitConfig(_Section):
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


class CounterfactualConfig(_Section):
    """The split of `source_split` records with one supporting write's value changed."""

    num_samples: int = pydantic.Field(ge=1)
    source_split: Literal["validation_iid", "test_iid"] = "test_iid"


GENERATED_SPLITS = ("train", "validation_iid", "test_iid", "heldout_pairs", "structural_ood")
COUNTERFACTUAL_SPLIT = "counterfactual"
HELDOUT_SPLIT = "heldout_pairs"


class BenchmarkConfig(_Section):
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


class ModelConfig(_Section):
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


class BirthThresholds(_Section):
    """A metric is born where its `validation_iid` value reaches its threshold."""

    answer_accuracy: float
    q: float
    r: float
    w: float


class Stabilization(_Section):
    """From which checkpoint on a run's measures count as stable (docs/definitions.md, section 7)."""

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


class EvaluationConfig(_Section):
    """What a run evaluated while it trained."""

    batch_size: int = pydantic.Field(ge=1)
    max_eval_batches: int | None = pydantic.Field(default=None, ge=1)
    tracked_splits: tuple[str, ...] = ()
    birth_thresholds: BirthThresholds
    stabilization: Stabilization = Stabilization()


class RunConfig(_Section):
    """The part of a training run's `run_config.json` that an analysis reads."""

    run_name: str
    seed: int = pydantic.Field(ge=0, lt=2**63)
    benchmark_dir: str
    num_steps: int = pydantic.Field(ge=1)
    checkpoint_every_steps: int = pydantic.Field(ge=1)
    model: ModelConfig
    evaluation: EvaluationConfig


class InitializedModelConfig(ModelConfig):
    """The transformer's shape, and how its weights start: PyTorch's defaults times `init_scale`."""

    init_scale: float = pydantic.Field(default=1.0, gt=0.0)

    @pydantic.field_validator("dropout")
    @classmethod
    def _no_dropout(cls, dropout: float) -> float:
        if dropout != 0.0:
            raise ValueError("the trainer has no dropout; expected 0.0")
        return dropout


class ScheduleConfig(_Section):
    """The learning rate after the warm-up. A cosine decay runs from `decay_start_step` (default: the end of the
    warm-up) to `decay_end_step` (default: the last step), down to `min_learning_rate` (default: 0)."""

    kind: Literal["constant", "cosine_decay"] = "constant"
    decay_start_step: int | None = None
    decay_end_step: int | None = None
    min_learning_rate: float | None = None


class OptimizationConfig(_Section):
    """AdamW as PyTorch defines it, with clipping by global norm (none where `grad_clip_norm` is null)."""

    learning_rate: float = pydantic.Field(gt=0.0)
    weight_decay: float = pydantic.Field(ge=0.0)
    beta1: float = pydantic.Field(ge=0.0, lt=1.0)
    beta2: float = pydantic.Field(ge=0.0, lt=1.0)
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
    """What is evaluated while training. The `max_analysis_batches` and `analysis_splits` of older configs are accepted;
    analyses are the sweep's."""

    max_analysis_batches: int | None = None
    analysis_splits: tuple[str, ...] = ()

    @pydantic.model_validator(mode="after")
    def _tracks_something(self) -> TrainingEvaluationConfig:
        if not self.tracked_splits:
            raise ValueError("tracked_splits names no split")
        return self


class CheckpointingConfig(_Section):
    """Which checkpoints are kept, and what makes one the best."""

    save_step_checkpoints: bool = True
    save_best_checkpoint: bool = True
    best_checkpoint_split: str
    best_checkpoint_metric: Literal["answer_accuracy", "token_accuracy", "loss"] = "answer_accuracy"
    best_checkpoint_maximize: bool = True


class TrainConfig(RunConfig):
    """A training run. `device` and `num_workers` are accepted from older configs; JAX picks the device."""

    seed: int = pydantic.Field(ge=0, lt=2**32)  # JAX keys hold no more
    device: str = "auto"
    output_dir: str
    batch_size: int = pydantic.Field(ge=1)
    log_every_steps: int = pydantic.Field(ge=1)
    eval_every_steps: int = pydantic.Field(ge=1)
    num_workers: int = 0
    model: InitializedModelConfig
    optimization: OptimizationConfig
    evaluation: TrainingEvaluationConfig
    checkpointing: CheckpointingConfig

    @pydantic.model_validator(mode="after")
    def _best_is_tracked(self) -> TrainConfig:
        split = self.checkpointing.best_checkpoint_split
        if self.checkpointing.save_best_checkpoint and split not in self.evaluation.tracked_splits:
            raise ValueError(f"best_checkpoint_split {split} is not among evaluation.tracked_splits")
        return self


class TriggerConfig(_Section):
    """One kind of trigger of a birth window."""

    shift_floor: float = pydantic.Field(
        gt=0.0,
        description="Smallest level shift that means anything, in the metric's unit, however little noise it has.",
    )
    expected_wobble: float = pydantic.Field(
        gt=0.0,
        description="Standard deviation from checkpoint to checkpoint to expect before the trajectory is seen; with "
        "many checkpoints the metric's own wobble takes its place.",
    )
    direction: Literal["rise", "fall", "either"] = pydantic.Field(
        default="either", description="Which way a shift must go to count."
    )
    opens_window: bool = pydantic.Field(
        default=True,
        description="Whether such shifts make a window; those that cannot are listed in the windows they fall in.",
    )


class TriggersConfig(_Section):
    """The triggers, by kind (docs/birth_windows.md)."""

    answer_accuracy: TriggerConfig
    heldout_answer_accuracy: TriggerConfig
    q: TriggerConfig
    r: TriggerConfig
    w: TriggerConfig
    key_selectivity: TriggerConfig
    recency_selectivity: TriggerConfig
    head_accuracy_drop: TriggerConfig
    mlp_accuracy_drop: TriggerConfig
    residual_drift: TriggerConfig
    head_rank_correlation: TriggerConfig


class WindowConfig(_Section):
    """How birth windows are found. docs/birth_windows.md says how the shipped values were calibrated."""

    side_checkpoints: int = pydantic.Field(
        ge=1, description="Checkpoints averaged on each side of a gap (m); fewer at the run's edges."
    )
    # Two at least, so that a window has a checkpoint inside also where a shift is in the run's last gap.
    min_side_checkpoints: int = pydantic.Field(
        ge=2, description="Fewest checkpoints on a side for a gap to be scored: a shift must be seen to hold."
    )
    min_checkpoints: int = pydantic.Field(
        ge=4, description="Runs with fewer measured checkpoints are undecidable: nothing shows what their noise is."
    )
    jump_share: float = pydantic.Field(
        ge=0.0, le=1.0, description="Share of a shift that must happen between the two checkpoints of its own gap."
    )
    wobble_lags: tuple[int, ...] = pydantic.Field(
        min_length=1,
        description="Distances, in checkpoints, of the second differences that measure wobble, the shortest first.",
    )
    wobble_radius: int = pydantic.Field(ge=1, description="Checkpoints around a gap whose wobble counts for it.")
    prior_weight: float = pydantic.Field(
        gt=0.0, description="Weight of a trigger's expected_wobble, in observed checkpoints."
    )
    threshold: float = pydantic.Field(
        gt=0.0, description="Score that each of `corroboration` metrics must reach; calibrated by simulation."
    )
    threshold_alone: float = pydantic.Field(gt=0.0, description="Score at which a single metric makes a window.")
    corroboration: int = pydantic.Field(
        ge=1, description="Metrics (a measure on one split, of one component) that must shift together."
    )
    similar_support: float = pydantic.Field(
        ge=0.0,
        le=1.0,
        description="Unbroken groups of shifts are one window if the smaller has this share of the larger's.",
    )
    calibrated_tests: int = pydantic.Field(
        ge=1,
        description="Number of (gap, metric) pairs the thresholds were calibrated for; larger runs raise them.",
    )
    resamples: int = pydantic.Field(ge=50, description="Bootstrap resamples of sequences.")
    resample_seed: int = pydantic.Field(ge=0, description="Seed of the resamples.")
    persistence: int = pydantic.Field(
        ge=1, description="Further checkpoints at or above its threshold that make a metric born."
    )
    triggers: TriggersConfig

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> WindowConfig:
        if self.min_side_checkpoints > self.side_checkpoints:
            raise ValueError(
                f"min_side_checkpoints {self.min_side_checkpoints} is above side_checkpoints {self.side_checkpoints}"
            )
        if self.threshold_alone < self.threshold:
            raise ValueError(f"threshold_alone {self.threshold_alone} is below threshold {self.threshold}")
        if self.wobble_lags[0] < 1 or list(self.wobble_lags) != sorted(set(self.wobble_lags)):
            raise ValueError(f"wobble_lags {list(self.wobble_lags)} are not ascending from 1 or more")
        return self


Config = TypeVar("Config", bound=pydantic.BaseModel)


def read_config(path: Path, schema: type[Config], *, recorded: bool = False) -> Config:
    """Returns the config in a JSON file, validated.

    Args:
      path: the file.
      schema: what it must fit.
      recorded: the file is a run's record of itself, perhaps another trainer's: fields unknown here are left alone.

    Raises:
      InputError: the file is missing, is not JSON, or does not fit the schema.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise unusable(path, f"a {schema.__name__} JSON file", "no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise unusable(path, f"a {schema.__name__} JSON file", error) from None
    try:
        return schema.model_validate(document, extra="ignore" if recorded else "forbid")
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
