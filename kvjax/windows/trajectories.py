"""From a sweep's arrays to trajectories: one number per checkpoint, metric and bootstrap resample."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import xarray as xr

from kvjax.config.benchmark import HELDOUT_SPLIT
from kvjax.config.windows import WindowConfig
from kvjax.measure.uncertainty import bootstrap_ratios, resample_counts
from kvjax.model.components import Component

# Name of a behavioural metric -> the values of each read that it averages.
BEHAVIOUR = {
    "answer_accuracy": "read_correct",
    "q": "read_q",
    "r": "read_r",
    "w": "read_margin",
    "key_selectivity": "read_key_selectivity",
    "recency_selectivity": "read_recency_selectivity",
}

# The rank order of fewer heads takes too few values to have a level.
_FEWEST_RANKED_HEADS = 6

# Cosine drift below this is rounding.
_SMALLEST_DRIFT = 1e-6


@dataclasses.dataclass(frozen=True)
class Metric:
    """What one trajectory is of.

    Attributes:
      kind: of trigger, as in the window config.
      measure: what is measured: its trajectories on the splits share a wobble, and one order entry.
      split: the split it is measured on.
      layer: of a component or None.
      head: of a head or None.
    """

    kind: str
    measure: str
    split: str
    layer: int | None = None
    head: int | None = None


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """All trajectories of a run that triggers look at.

    Attributes:
      steps: [C] training steps.
      metrics: M of them.
      values_CxM: NaN where a value does not exist.
      samples_JxCxM: under resamples of sequences, the same for all checkpoints and metrics. Repeats the values where
        the sweep stores no per-sequence values (residual drift): such a metric's noise is its wobble alone.
    """

    steps: np.ndarray
    metrics: tuple[Metric, ...]
    values_CxM: np.ndarray
    samples_JxCxM: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Series:
    metric: Metric
    values_C: np.ndarray
    samples_JxC: np.ndarray


def run_trajectories(means: xr.Dataset, events: xr.Dataset, config: WindowConfig) -> Trajectories:
    """Returns a run's trajectories from its sweep.

    Args:
      means: the sweep's labelled means.
      events: the values of reads and sequences that they are made of.
      config: number and seed of the resamples.
    """
    splits_N = events["split"].values
    codes_N = np.unique(splits_N, return_inverse=True)[1]
    counts_JxN = resample_counts(codes_N, resamples=config.resamples, seed=config.resample_seed)
    series: list[_Series] = []
    # In the order of the file, so that equal runs have equal metrics.
    for split in dict.fromkeys(splits_N.tolist()):
        series.extend(_split_series(means, events, split, np.flatnonzero(splits_N == split), counts_JxN))
    return Trajectories(
        steps=means["step"].values.astype(np.int64),
        metrics=tuple(one.metric for one in series),
        values_CxM=np.stack([one.values_C for one in series], axis=1),
        samples_JxCxM=np.stack([one.samples_JxC for one in series], axis=2),
    )


def pooling_matrix(metrics: tuple[Metric, ...]) -> np.ndarray:
    """Returns rows that average over the splits of one measure, [M, M]."""
    measures = np.array([metric.measure for metric in metrics])
    same = (measures[:, None] == measures[None, :]).astype(np.float32)
    return same / same.sum(axis=1, keepdims=True)


def component_drops(
    means: xr.Dataset, events: xr.Dataset, config: WindowConfig
) -> tuple[list[tuple[int, int | None]], np.ndarray, np.ndarray]:
    """Returns the accuracy every head's and MLP's ablation costs over the whole probe set.

    Returns:
      The components (layer, head or None), their drops [C, X], and the drops' bootstrap standard deviations [C, X].
    """
    codes_N = np.unique(events["split"].values, return_inverse=True)[1]
    counts_JxN = resample_counts(codes_N, resamples=config.resamples, seed=config.resample_seed)
    everyone = np.arange(len(codes_N))
    reads_N = events["is_read"].values.sum(axis=1).astype(float)
    components, drops, deviations = [], [], []
    for _, layer, head, lost_CxN in _ablations(events, everyone):
        samples = _resampled(lost_CxN, np.broadcast_to(reads_N, lost_CxN.shape), counts_JxN)
        components.append((layer, head))
        drops.append(lost_CxN.sum(axis=1) / reads_N.sum())
        deviations.append(samples.std(axis=0))
    return components, np.stack(drops, axis=1), np.stack(deviations, axis=1)


def _split_series(
    means: xr.Dataset, events: xr.Dataset, split: str, members: np.ndarray, counts_JxN: np.ndarray
) -> Iterator[_Series]:
    counts = counts_JxN[:, members]
    is_read = events["is_read"].values[members]
    reads_N = is_read.sum(axis=1).astype(float)

    def ratio(metric: Metric, sums_CxN: np.ndarray, totals_CxN: np.ndarray) -> _Series:
        totals = totals_CxN.sum(axis=1)
        values = np.divide(sums_CxN.sum(axis=1), totals, out=np.full(len(totals), np.nan), where=totals > 0)
        return _Series(metric, values, _resampled(sums_CxN, totals_CxN, counts))

    for measure, source in BEHAVIOUR.items():
        values = events[source].values[:, members].astype(float)
        counted = is_read & ~np.isnan(values)
        name = measure
        if measure == "answer_accuracy" and split == HELDOUT_SPLIT:
            name = "heldout_answer_accuracy"
        sums = np.where(counted, values, 0.0).sum(axis=2)
        yield ratio(Metric(name, name, split), sums, counted.sum(axis=2).astype(float))
    head_samples, head_values = [], []
    for kind, layer, head, lost_CxN in _ablations(events, members):
        measure = f"{kind}.{Component(layer, head)}"
        one = ratio(Metric(kind, measure, split, layer, head), lost_CxN, np.broadcast_to(reads_N, lost_CxN.shape))
        yield one
        if head is not None:
            head_values.append(one.values_C)
            head_samples.append(one.samples_JxC)
    if len(head_values) >= _FEWEST_RANKED_HEADS:
        metric = Metric("head_rank_correlation", "head_rank_correlation", split)
        values, samples = (_rank_correlation_to_previous(np.stack(x, axis=-1)) for x in (head_values, head_samples))
        yield _Series(metric, values, samples)
    steps = means["step"].values.astype(float)
    drift = means["residual_drift"].sel(split=split, position_role="prediction")
    for stage in drift["stage"].values.tolist()[1:]:  # the embedding of p_e's own token says little
        per_step = np.full(len(steps), np.nan)
        per_step[1:] = np.log10(np.maximum(drift.sel(stage=stage).values[1:], _SMALLEST_DRIFT) / np.diff(steps))
        metric = Metric("residual_drift", f"residual_drift.{stage}", split)
        yield _Series(metric, per_step, np.broadcast_to(per_step, (len(counts), len(steps))))


def _ablations(events: xr.Dataset, members: np.ndarray) -> Iterator[tuple[str, int, int | None, np.ndarray]]:
    """Yields kind, layer, head and the right answers that each zero ablation costs each sequence, [C, N]."""
    is_read = events["is_read"].values[members]
    clean_CxN = np.where(is_read, events["read_correct"].values[:, members], 0).sum(axis=2).astype(float)
    heads = events["head_zero_correct"].values[:, members]
    for layer, head in np.ndindex(*heads.shape[2:]):
        yield "head_accuracy_drop", layer, head, clean_CxN - heads[:, :, layer, head]
    mlps = events["mlp_zero_correct"].values[:, members]
    for layer in range(mlps.shape[2]):
        yield "mlp_accuracy_drop", layer, None, clean_CxN - mlps[:, :, layer]


def _resampled(sums_CxN: np.ndarray, totals_CxN: np.ndarray, counts_JxN: np.ndarray) -> np.ndarray:
    return bootstrap_ratios(counts_JxN, sums_CxN.T, totals_CxN.T)


def _rank_correlation_to_previous(drops_XxCxH: np.ndarray) -> np.ndarray:
    """Returns Spearman's correlation of heads' drops with the previous checkpoint's, [..., C]; the first is NaN."""
    from scipy import stats  # most of a second to import, and every command imports this module

    ranks = stats.rankdata(drops_XxCxH, axis=-1)
    centred = ranks - ranks.mean(axis=-1, keepdims=True)
    norm = np.sqrt((centred**2).sum(axis=-1))
    product = (centred[..., 1:, :] * centred[..., :-1, :]).sum(axis=-1)
    scale = norm[..., 1:] * norm[..., :-1]
    correlations = np.full(norm.shape, np.nan)
    correlations[..., 1:] = np.divide(product, scale, out=np.full(scale.shape, np.nan), where=scale > 0)
    return correlations
