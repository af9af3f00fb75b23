"""Searches the trajectories of a run for windows: scores every gap, then finds shifts, windows and ramps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np

from kvjax.config.windows import WindowConfig
from kvjax.windows.disguises import origins
from kvjax.windows.group_shifts import DetectionSettings, Shift, Window, find_shifts, find_windows
from kvjax.windows.growth import growing
from kvjax.windows.onset import movement_steps
from kvjax.windows.ramps import Ramp, find_ramps, is_growth
from kvjax.windows.shift_scores import MetricTraits, ShiftSettings, shift_scores
from kvjax.windows.trajectories import Metric, Trajectories, pooling_matrix

Verdict = Literal["windows", "no transition", "undecidable"]

# Runs are padded to a multiple of this many checkpoints, so that a growing run does not compile a program each time.
_CHECKPOINT_MULTIPLE = 8

_DIRECTIONS = {"rise": 1.0, "fall": -1.0, "either": 0.0}


@dataclasses.dataclass(frozen=True)
class RunFinding:
    """What the search found in one run.

    Attributes:
      trajectories: of the run.
      verdict: what it comes to.
      windows: in order; none unless the verdict is `windows`.
      largest: the shift with the largest score among those that hold, strong enough or not; None if none holds.
      joining: shifts above the threshold of kinds that open no window.
      origins: the shift that each repeats, or itself.
      growing: shifts that are samples of steady growth, or that it explains as well; they found no window.
      ramps: steady growth, which makes no window.
    """

    trajectories: Trajectories
    verdict: Verdict
    windows: tuple[Window, ...]
    largest: Shift | None
    joining: tuple[Shift, ...]
    origins: Mapping[Shift, Shift] = dataclasses.field(default_factory=dict)
    growing: frozenset[Shift] = frozenset()
    ramps: tuple[Ramp, ...] = ()


def find_in_run(run: Trajectories, config: WindowConfig) -> RunFinding:
    """Finds shifts, windows and ramps in a run."""
    size, score, holds = _score(run, config)
    opens = [getattr(config.triggers, metric.kind).opens_window for metric in run.metrics]
    num_tests = int(np.isfinite(score).sum())
    if len(run.steps) < config.min_checkpoints or not num_tests:
        return RunFinding(run, "undecidable", (), None, ())
    settings = detection_settings(config)
    spread = _range(run.values_CxM)

    def found(threshold: float) -> list[Shift]:
        shifts = find_shifts(size, score, holds, spread, threshold=threshold)
        side = config.side_checkpoints
        return [shift for shift in shifts if not run.breaks.founds_no_window(shift, side=side)]

    every = found(0.0)
    openers = [shift for shift in every if opens[shift.metric]]
    largest = max(openers, key=lambda shift: shift.score, default=None)
    traits = [getattr(config.triggers, metric.kind) for metric in run.metrics]
    floors = np.array([trigger.shift_floor for trigger in traits])
    at = {"threshold": config.threshold, "side": config.side_checkpoints}
    strong = found(config.threshold)
    sampled = {
        shift
        for shift in strong
        if is_growth(shift, run.values_CxM[:, shift.metric], run.steps, floor=floors[shift.metric], **at)
    }
    shifts = [shift for shift in strong if shift not in sampled]
    repeats = origins(shifts, run, side=config.side_checkpoints)
    explained = growing(shifts, run, floors, **at)
    courses = course_steps(run.values_CxM[None], run.steps, shifts, shifts, side=config.side_checkpoints)[0]
    windows = find_windows(
        shifts,
        courses[:, [0, 2]],
        [metric.kind for metric in run.metrics],
        opens,
        origins=repeats,
        growing=explained,
        steps=run.steps,
        num_tests=num_tests,
        settings=settings,
    )
    joining = tuple(shift for shift in shifts if not opens[shift.metric])
    verdict: Verdict = "windows" if windows else "no transition"
    with np.errstate(invalid="ignore", divide="ignore"):
        errors = np.ma.masked_invalid(np.abs(size) / score)
    noise = np.ma.median(errors, axis=0).filled(np.nan)
    needed = {"alone": config.threshold_alone, "corroboration": config.corroboration}
    in_windows = {shift for window in windows for shift in window.shifts}
    jumps = [shift for shift in shifts if shift in in_windows or shift not in explained]
    ramps = find_ramps(run.values_CxM, noise, floors, jumps, **at, **needed)
    return RunFinding(run, verdict, tuple(windows), largest, joining, repeats, explained | sampled, tuple(ramps))


def metric_traits(metrics: tuple[Metric, ...], config: WindowConfig) -> MetricTraits:
    """Collects what the config says of each metric."""
    triggers = [getattr(config.triggers, metric.kind) for metric in metrics]
    return MetricTraits(
        floor=jnp.asarray([trigger.shift_floor for trigger in triggers], jnp.float32),
        wobble=jnp.asarray([trigger.expected_wobble for trigger in triggers], jnp.float32),
        direction=jnp.asarray([_DIRECTIONS[trigger.direction] for trigger in triggers], jnp.float32),
        pooling=jnp.asarray(pooling_matrix(metrics), jnp.float32),
    )


def shift_settings(config: WindowConfig) -> ShiftSettings:
    """Takes the static settings of the scores from a config."""
    return ShiftSettings(
        side=config.side_checkpoints,
        min_side=config.min_side_checkpoints,
        jump_share=config.jump_share,
        wobble_lags=config.wobble_lags,
        wobble_radius=config.wobble_radius,
        prior_weight=config.prior_weight,
        threshold=config.threshold,
    )


def detection_settings(config: WindowConfig) -> DetectionSettings:
    """Takes the settings of the search from a config."""
    return DetectionSettings(
        threshold=config.threshold,
        threshold_alone=config.threshold_alone,
        corroboration=config.corroboration,
        similar_support=config.similar_support,
        calibrated_tests=config.calibrated_tests,
    )


def course_steps(
    values_XxCxM: np.ndarray,
    steps_C: np.ndarray,
    shifts: Sequence[Shift],
    others: Sequence[Shift],
    *,
    side: int,
    skipped: int = 0,
) -> np.ndarray:
    """Dates onset, midpoint and completion of each shift in X versions of the trajectories, [X, shifts, 3].

    Args:
      values_XxCxM: the trajectories, or their resamples.
      steps_C: training steps.
      shifts: the shifts to date.
      others: all shifts of the run; those of the same metric bound the stretch that belongs to a shift.
      side: checkpoints taken for floor and plateau.
      skipped: those of them next to the movement that are left out of the averages.
    """
    n = len(steps_C)
    if not shifts:
        return np.full((len(values_XxCxM), 0, 3), np.nan)
    segments = np.array([_segment(shift, others, n) for shift in shifts])
    padding = _padded_length(n) - n
    values = values_XxCxM[:, :, [shift.metric for shift in shifts]].transpose(0, 2, 1)
    # Padded to fixed sizes, so that few programs are compiled; padding carries no weight.
    more = _padded_length(len(shifts)) - len(shifts)
    values = np.pad(values, ((0, 0), (0, more), (0, padding)), constant_values=np.nan)

    def padded(numbers: Sequence[float] | np.ndarray, dtype: type) -> np.ndarray:
        array = np.asarray(numbers, dtype)
        return np.pad(array, ((0, more), *[(0, 0)] * (array.ndim - 1)), mode="edge")

    # Steps relative to the first and in float32: exact up to 16 million steps.
    steps = np.pad(steps_C - steps_C[0], (0, padding), mode="edge")
    courses = movement_steps(
        jnp.asarray(values, jnp.float32),
        jnp.asarray(steps, jnp.float32),
        jnp.asarray(padded([np.sign(shift.size) for shift in shifts], np.float32)),
        jnp.asarray(padded([shift.first for shift in shifts], np.int32)),
        jnp.asarray(padded([shift.last for shift in shifts], np.int32)),
        jnp.asarray(padded(segments, np.int32)),
        jnp.asarray(side, jnp.int32),
        jnp.asarray(skipped, jnp.int32),
    )
    return np.asarray(courses, np.float64)[:, : len(shifts)] + float(steps_C[0])


def _score(run: Trajectories, config: WindowConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores a run's gaps: sizes, scores and whether they hold, [G, M] each.

    A run is scored by a program of its own, never beside others: sums over another number of rows differ in their last
    digits, and what is found in a run must not depend on which others are looked at.
    """
    gaps = len(run.steps) - 1
    missing = _padded_length(len(run.steps)) - len(run.steps)

    def padded(array: np.ndarray, axis: int) -> jnp.ndarray:
        widths = [(0, missing if along == axis else 0) for along in range(array.ndim)]
        return jnp.asarray(np.pad(array, widths, constant_values=np.nan), jnp.float32)

    relative = run.steps - run.steps[0]
    steps = np.concatenate([relative, relative[-1] + 1 + np.arange(missing)])
    scores = shift_scores(
        padded(run.values_CxM, 0),
        padded(run.samples_JxCxM, 1),
        jnp.asarray(steps, jnp.float32),
        metric_traits(run.metrics, config),
        settings=shift_settings(config),
    )
    return np.asarray(scores.size)[:gaps], np.asarray(scores.score)[:gaps], np.asarray(scores.holds)[:gaps]


def _range(values_CxM: np.ndarray) -> np.ndarray:
    there = np.isfinite(values_CxM)
    high = np.where(there, values_CxM, -np.inf).max(axis=0)
    low = np.where(there, values_CxM, np.inf).min(axis=0)
    return np.where(high > low, high - low, 1.0)


def _segment(shift: Shift, others: Sequence[Shift], n: int) -> tuple[int, int]:
    """Finds the first and last checkpoint between the same metric's earlier and later shift."""
    same = [other for other in others if other.metric == shift.metric]
    earlier = [other.last + 1 for other in same if other.last < shift.first]
    later = [other.first for other in same if other.first > shift.last]
    return max(earlier, default=0), min(later, default=n - 1)


def _padded_length(n: int) -> int:
    return -(-n // _CHECKPOINT_MULTIPLE) * _CHECKPOINT_MULTIPLE
