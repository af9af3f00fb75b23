"""Birth-window configs: triggers and thresholds (docs/birth_windows.md)."""

from __future__ import annotations

from typing import Literal

import pydantic

from kvjax.config.base import Section
from kvjax.measure.registry import triggers


class TriggerConfig(Section):
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


# One field for every kind of trigger that a measure declares (docs/birth_windows.md).
TriggersConfig = pydantic.create_model(
    "TriggersConfig", __base__=Section, **{field.trigger: (TriggerConfig, ...) for _, field in triggers()}
)


class WindowConfig(Section):
    """How birth windows are found. docs/birth_windows.md says how the shipped values were calibrated."""

    side_checkpoints: int = pydantic.Field(
        ge=1, le=1_000_000, description="Checkpoints averaged on each side of a gap (m); fewer at the run's edges."
    )
    # Two at least, so that a window has a checkpoint inside even if a shift is in the run's last gap.
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
    resamples: int = pydantic.Field(ge=50, le=100_000, description="Bootstrap resamples of sequences.")
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
