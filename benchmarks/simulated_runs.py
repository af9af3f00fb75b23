"""Simulates runs with the metrics of a small model and a known truth, for the search for birth windows.

A run has every behavioural measure that is a trigger, 12 heads, 3 MLPs, rank order and residual drift, on 4 splits.
Every value is a level, plus the mean of sequences that keep their own difficulty over checkpoints and err anew at each
(clustered, paired event noise), plus a wobble of training that is autocorrelated. Both noises are partly shared between
metrics. Sizes are in standard deviations of one checkpoint's total noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from kvjax.config.windows import WindowConfig
from kvjax.measure import registry
from kvjax.measure.uncertainty import resample_counts
from kvjax.model.components import Component, all_components
from kvjax.windows.trajectories import Metric, Trajectories

SPLITS = ("validation_iid", "heldout_pairs", "structural_ood", "counterfactual")
# Fields of rows that windows watch on every split.
BEHAVIOUR = tuple(
    field.name for measure, field in registry.triggers() if measure.level == "read" and "split" not in field.where
)
LAYERS, HEADS = 3, 4
SEQUENCES = 96  # per split

# A metric's noise is its expected wobble times exp of a normal with this standard deviation: between measures, and
# between the splits of one.
MEASURE_SPREAD, SPLIT_SPREAD = 0.4, 0.2
# Shares of a noise's variance that metrics have in common: all of a run, and the splits of one measure.
SHARED_BY_ALL, SHARED_BY_SPLITS = 0.2, 0.4
# What copies another measure altogether: without layer 0's MLP nothing is answered, and the competitor stays the same.
COPIES = {f"mlp_accuracy_drop.{Component(0)}": "answer_accuracy", "fixed_margin": "w"}

# Steps as many trainers save them while a run is young.
LOG_STEPS = np.array([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000])


@dataclasses.dataclass(frozen=True)
class Noise:
    """The noise of a simulated run.

    Attributes:
      autocorrelation: of the wobble, from checkpoint to checkpoint.
      wobble_share: of the noise's variance; event noise is the rest.
      scale: noise over what the config expects.
    """

    autocorrelation: float
    wobble_share: float
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Truth:
    """The events of a simulated run.

    Attributes:
      kind: flat, drift, shift, two shifts, or spike. A spike that lasts as long as a shift must hold is two shifts.
      size: of it, in noise standard deviations (a drift's over the whole run).
      measures: number of behavioural measures that change.
      splits: number of splits they change on.
      missing: share of the run's checkpoints that were not saved, so that steps are uneven.
      length: of a spike, in checkpoints.
      spaced: whether the run has every 250th step or `LOG_STEPS`.
      even_in: a drift grows evenly in steps, or in their logarithm.
    """

    kind: str
    size: float = 0.0
    measures: int = 2
    splits: int = 4
    missing: float = 0.0
    length: int = 1
    spaced: Literal["evenly", "log"] = "evenly"
    even_in: Literal["steps", "log steps"] = "steps"


def metrics() -> tuple[Metric, ...]:
    """Lists the metrics of a simulated run."""
    listed = []
    for split in SPLITS:
        for measure in BEHAVIOUR:
            heldout = measure == "answer_accuracy" and split == "heldout_pairs"
            name = "heldout_answer_accuracy" if heldout else measure
            listed.append(Metric(name, name, split))
        for component in all_components(LAYERS, HEADS):
            kind = "mlp_accuracy_drop" if component.is_mlp else "head_accuracy_drop"
            listed.append(Metric(kind, f"{kind}.{component}", split, component.layer, component.head))
        listed.append(Metric("head_rank_correlation", "head_rank_correlation", split))
        for stage in ("post_attn", "post_mlp"):
            listed.append(Metric("residual_drift", f"residual_drift.{stage}", split))
    return tuple(listed)


def simulate(
    rng: np.random.Generator, checkpoints: int, noise: Noise, truth: Truth, config: WindowConfig
) -> tuple[Trajectories, list[int]]:
    """Simulates one run, with the gaps at which something truly happened."""
    listed = metrics()
    expected = np.array([getattr(config.triggers, metric.kind).expected_wobble for metric in listed])
    _, family = np.unique([metric.measure for metric in listed], return_inverse=True)
    spread = MEASURE_SPREAD * rng.standard_normal(family.max() + 1)[family]
    total = noise.scale * expected * np.exp(spread + SPLIT_SPREAD * rng.standard_normal(len(listed)))
    steps = np.arange(1, checkpoints + 1) * 250
    if truth.missing:
        full = round(checkpoints / (1 - truth.missing))
        steps = np.sort(rng.choice(np.arange(1, full + 1), checkpoints, replace=False)) * 250
    if truth.spaced == "log":
        steps = LOG_STEPS[:checkpoints]
    # Those measures move whose shifts can open a window.
    opening = [name for name in BEHAVIOUR if name not in COPIES and getattr(config.triggers, name).opens_window]
    level, gaps = _levels(rng, steps, listed, total, truth, opening, hold=config.side_checkpoints)
    common = _autocorrelated(rng, checkpoints, 1, noise.autocorrelation)
    shared = _autocorrelated(rng, checkpoints, family.max() + 1, noise.autocorrelation)[:, family]
    own = _autocorrelated(rng, checkpoints, len(listed), noise.autocorrelation)
    wobble = np.sqrt(SHARED_BY_ALL) * common + np.sqrt(SHARED_BY_SPLITS) * shared
    wobble = wobble + np.sqrt(1 - SHARED_BY_ALL - SHARED_BY_SPLITS) * own
    level = level + np.sqrt(noise.wobble_share) * total * wobble
    values, samples = np.empty(level.shape), np.empty((config.resamples, *level.shape), np.float32)
    event = np.sqrt((1 - noise.wobble_share) * SEQUENCES) * total
    for split in SPLITS:
        columns = [i for i, metric in enumerate(listed) if metric.split == split]
        counts = resample_counts(np.zeros(SEQUENCES), resamples=config.resamples, seed=int(rng.integers(2**31)))
        own_difficulty = 3 * rng.standard_normal((SEQUENCES, 1, len(columns)))
        errors = np.sqrt(SHARED_BY_ALL) * rng.standard_normal((SEQUENCES, checkpoints, 1))
        errors = errors + np.sqrt(1 - SHARED_BY_ALL) * rng.standard_normal((SEQUENCES, checkpoints, len(columns)))
        sequences = (own_difficulty + errors) * event[columns]
        values[:, columns] = level[:, columns] + sequences.mean(axis=0)
        drawn = (counts / SEQUENCES) @ sequences.reshape(SEQUENCES, -1)
        samples[:, :, columns] = level[:, columns] + drawn.reshape(len(counts), checkpoints, -1)
    place = {(metric.measure.removeprefix("heldout_"), metric.split): i for i, metric in enumerate(listed)}
    for split in SPLITS:
        for copy, original in COPIES.items():
            to, of = place[copy, split], place[original, split]
            values[:, to], samples[:, :, to] = values[:, of], samples[:, :, of]
    return Trajectories(steps, listed, values, samples), gaps


def _levels(
    rng: np.random.Generator,
    steps: np.ndarray,
    listed: Sequence[Metric],
    total: np.ndarray,
    truth: Truth,
    opening: Sequence[str],
    *,
    hold: int,
) -> tuple[np.ndarray, list[int]]:
    """Draws the noiseless trajectories and the gaps of true shifts, three checkpoints or more from the ends."""
    n = len(steps)
    level = np.zeros((n, len(listed)))
    if truth.kind == "flat":
        return level, []
    chosen = rng.choice(opening, truth.measures, replace=False)
    splits = rng.choice(SPLITS, truth.splits, replace=False)
    moved = [
        i
        for i, metric in enumerate(listed)
        if metric.measure.removeprefix("heldout_") in chosen and metric.split in splits
    ]
    size = truth.size * total[moved]
    if truth.kind == "drift":
        # The logarithm of step 0 is taken for that of half a step.
        at = steps if truth.even_in == "steps" else np.log(np.maximum(steps, 0.5))
        level[:, moved] = ((at - at[0]) / (at[-1] - at[0]))[:, None] * size
        return level, []
    if truth.kind == "spike":
        # Of one checkpoint anywhere; a longer one comes and goes inside the run.
        begin = int(rng.integers(n) if truth.length == 1 else rng.integers(1, n - truth.length))
        level[begin : begin + truth.length, moved] = size
        return level, [begin - 1, begin + truth.length - 1] if truth.length >= hold else []
    places = [int(rng.integers(2, n - 3))]
    if truth.kind == "two shifts":
        places = [int(rng.integers(2, n // 2 - 1)), int(rng.integers(n // 2 + 2, n - 3))]
    for place in places:
        level[place + 1 :, moved] += size
    return level, places


def _autocorrelated(rng: np.random.Generator, n: int, width: int, autocorrelation: float) -> np.ndarray:
    wobble = rng.standard_normal((n, width))
    for c in range(1, n):
        wobble[c] = autocorrelation * wobble[c - 1] + np.sqrt(1 - autocorrelation**2) * wobble[c]
    return wobble
