"""Trajectories from a sweep's arrays: one number per checkpoint, metric and bootstrap resample."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import xarray as xr

from kvjax.config.windows import WindowConfig
from kvjax.measure import registry
from kvjax.measure.between_checkpoints import rank_correlation_to_previous
from kvjax.measure.declaration import Measure, RowField
from kvjax.measure.declarations import weights
from kvjax.measure.registry import ALL_SPLITS
from kvjax.measure.sequence_sums import Counting, SequenceSums, sequence_sums, source_names
from kvjax.measure.uncertainty import resample_counts, resampled_ratios
from kvjax.model.components import Component
from kvjax.windows.breaks import NO_BREAKS, Breaks

# The rank order of fewer heads takes too few values to have a level.
_FEWEST_RANKED_HEADS = 6

# Cosine drift below this is rounding.
_SMALLEST_DRIFT = 1e-6

# A relative change of all weights below this, per 1000 steps, is none.
_SMALLEST_CHANGE = 1e-6


@dataclasses.dataclass(frozen=True)
class Metric:
    """Names a trajectory.

    Attributes:
      kind: of trigger, as in the window config.
      measure: metric name without the split. Trajectories of one measure pool their noise estimate across splits and
        appear once in the order of a window.
      split: the split it is measured on; `all` for measures of weights, which no split has.
      layer: of a component, else None.
      head: of a head, else None.
      resampled: whether it varies with the sequences that are drawn. If not, its dates have no interval.
    """

    kind: str
    measure: str
    split: str
    layer: int | None = None
    head: int | None = None
    resampled: bool = True

    @property
    def is_importance(self) -> bool:
        """Checks whether it is the accuracy that ablating a component costs."""
        return self.kind in ("head_accuracy_drop", "mlp_accuracy_drop")


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """All trajectories of a run that triggers look at.

    Attributes:
      steps: [C] training steps.
      metrics: M of them.
      values_CxM: NaN if a value does not exist.
      breaks: where they are no trajectory.
      samples_JxCxM: under resamples of sequences, the same for all checkpoints and metrics. Residual drift
        and measures of weights have no per-sequence values: their resamples repeat the values, and their noise is their
        wobble alone.
    """

    steps: np.ndarray
    metrics: tuple[Metric, ...]
    values_CxM: np.ndarray
    samples_JxCxM: np.ndarray
    breaks: Breaks = NO_BREAKS


@dataclasses.dataclass(frozen=True)
class _Series:
    metric: Metric
    values_C: np.ndarray
    samples_JxC: np.ndarray


@dataclasses.dataclass(frozen=True)
class ComponentDrops:
    """Accuracy that ablating each of X components costs over the whole probe set.

    Attributes:
      components: the heads, then the MLPs.
      drops_CxX: at each checkpoint.
      deviations_CxX: their bootstrap standard deviations.
      chance: accuracy of guessing among the values.
      num_reads: of the probe set.
    """

    components: tuple[Component, ...]
    drops_CxX: np.ndarray
    deviations_CxX: np.ndarray
    chance: float
    num_reads: int


def run_trajectories(
    means: xr.Dataset,
    events: xr.Dataset,
    config: WindowConfig,
    breaks: Breaks = NO_BREAKS,
    *,
    ranked_by: str = "zero",
) -> Trajectories:
    """Makes a run's trajectories from its sweep.

    Args:
      means: the sweep's labelled means.
      events: the values of reads and sequences that they are made of.
      config: number and seed of the resamples.
      breaks: of the trajectory.
      ranked_by: the kind of ablation that the sweep ranks components by; triggers watch its drops alone.
    """
    splits_N = events["split"].values
    counts_JxN = _resample_counts(events, config)
    watched = list(_watched_sums(events, ranked_by))
    series: list[_Series] = []
    # In the order of the file, so that equal runs have equal metrics.
    for split in dict.fromkeys(splits_N.tolist()):
        series.extend(_split_series(means, watched, split, np.flatnonzero(splits_N == split), counts_JxN, breaks))
    series.extend(_weight_series(means, breaks, resamples=len(counts_JxN)))
    return Trajectories(
        steps=means["step"].values.astype(np.int64),
        metrics=tuple(one.metric for one in series),
        values_CxM=np.stack([one.values_C for one in series], axis=1),
        samples_JxCxM=np.stack([one.samples_JxC for one in series], axis=2),
        breaks=breaks,
    )


def pooling_matrix(metrics: tuple[Metric, ...]) -> np.ndarray:
    """Makes rows that average over the splits of one measure, [M, M]."""
    measures = np.array([metric.measure for metric in metrics])
    same = (measures[:, None] == measures[None, :]).astype(np.float32)
    return same / same.sum(axis=1, keepdims=True)


def component_drops(
    events: xr.Dataset, config: WindowConfig, *, chance: float, ranked_by: str = "zero"
) -> ComponentDrops:
    """Measures the accuracy that every head's and MLP's ablation costs over the whole probe set.

    Args:
      events, config, ranked_by: see `run_trajectories`.
      chance: accuracy of guessing among the values.
    """
    counts_JxN = _resample_counts(events, config)
    everyone = np.arange(counts_JxN.shape[1])
    components, drops, deviations = [], [], []
    for sums in _watched_sums(events, ranked_by):
        if sums.measure.lost_from is not None:
            for component, values_C, samples_JxC in _components(sums, everyone, counts_JxN):
                components.append(component)
                drops.append(values_C)
                deviations.append(samples_JxC.std(axis=0))
    reads = int(events["is_read"].values.sum())
    return ComponentDrops(tuple(components), np.stack(drops, axis=1), np.stack(deviations, axis=1), chance, reads)


def needed_events(ranked_by: str) -> set[str]:
    """Names the variables of the events that trajectories are made from, given the kind that ranks components."""
    return {"split", "is_read", "other_values", *map(_variable, _watched_sources(ranked_by))}


def needed_means() -> set[str]:
    """Names the measures of the means that trajectories are made from: those that no sequence has a share in."""
    return {"residual_drift", *(measure.name for measure, _ in _watched_weights())}


def _labels(ranked_by: str) -> dict[str, tuple[str, ...]]:
    """Labels the axes of watched sums: ablations of one kind alone."""
    return {"ablation": (ranked_by,)}


def _watched_sources(ranked_by: str) -> set[str]:
    """Names the measured arrays of every ratio that a trigger watches, and of the clean values it is compared with."""
    sources: set[str] = set()
    for measure, _ in registry.triggers():
        if measure.is_ratio:
            sources.update(source_names(measure, _labels(ranked_by)))
            if measure.lost_from is not None:
                sources.update(registry.declared(measure.lost_from).sources)
    return sources


def _variable(source: str) -> str:
    return source.replace("/", "_")


def _watched_sums(events: xr.Dataset, ranked_by: str) -> Iterator[SequenceSums]:
    """Forms the sums of every ratio that a trigger watches, as the sweep formed them."""
    is_read = events["is_read"].values.astype(bool)
    counts = {"reads": is_read, "contrasted": is_read & (events["other_values"].values > 0)}
    of_sequences = {name: counted.sum(axis=1) for name, counted in counts.items()}
    counting = Counting(is_read, counts=of_sequences, groups={}, labels=_labels(ranked_by))
    arrays = {source: events[_variable(source)].values for source in _watched_sources(ranked_by)}
    for measure in dict.fromkeys(measure.name for measure, _ in registry.triggers() if measure.is_ratio):
        sums = sequence_sums(registry.declared(measure), arrays, counting)
        assert sums is not None  # every array it needs is among the sources above
        yield sums


def _resample_counts(events: xr.Dataset, config: WindowConfig) -> np.ndarray:
    codes_N = np.unique(events["split"].values, return_inverse=True)[1]
    return resample_counts(codes_N, resamples=config.resamples, seed=config.resample_seed)


def _split_series(
    means: xr.Dataset,
    watched: Sequence[SequenceSums],
    split: str,
    members: np.ndarray,
    counts_JxN: np.ndarray,
    breaks: Breaks,
) -> Iterator[_Series]:
    head_values, head_samples = [], []
    for sums in watched:
        field = _field_on(sums.measure, split)
        if sums.measure.level not in ("head", "mlp"):
            values, samples = resampled_ratios(counts_JxN[:, members], *sums.of_sequences(members))
            yield _Series(Metric(field.trigger, field.trigger, split), values, samples)
            continue
        for component, values, samples in _components(sums, members, counts_JxN):
            name = f"{field.trigger}.{component}"
            yield _Series(Metric(field.trigger, name, split, component.layer, component.head), values, samples)
            if field.trigger == "head_accuracy_drop":
                head_values.append(values)
                head_samples.append(samples)
    if len(head_values) >= _FEWEST_RANKED_HEADS:
        metric = Metric("head_rank_correlation", "head_rank_correlation", split)
        values, samples = (rank_correlation_to_previous(np.stack(x, axis=-1)) for x in (head_values, head_samples))
        yield _Series(metric, values, samples)
    yield from _drift_series(means, split, breaks, resamples=len(counts_JxN))


def _drift_series(means: xr.Dataset, split: str, breaks: Breaks, *, resamples: int) -> Iterator[_Series]:
    """Yields the log drift per step of every stage but the embedding, which repeats its values as resamples.

    There is none from a checkpoint of another trajectory.
    """
    steps = means["step"].values.astype(float)
    drift = means["residual_drift"].sel(split=split, position_role="prediction")
    for stage in drift["stage"].values.tolist()[1:]:  # the embedding of p_e's own token says little
        per_step = np.full(len(steps), np.nan)
        per_step[1:] = np.log10(np.maximum(drift.sel(stage=stage).values[1:], _SMALLEST_DRIFT) / np.diff(steps))
        per_step[[int(step) in breaks.no_drift for step in steps]] = np.nan
        metric = Metric("residual_drift", f"residual_drift.{stage}", split, resampled=False)
        yield _Series(metric, per_step, np.broadcast_to(per_step, (resamples, len(steps))))


def _watched_weights() -> Iterator[tuple[Measure, RowField]]:
    """Yields the fields of weights that a trigger watches."""
    for measure, field in registry.triggers():
        if measure in weights.MEASURES:
            yield measure, field


def _weight_series(means: xr.Dataset, breaks: Breaks, *, resamples: int) -> Iterator[_Series]:
    """Yields measures of weights, which repeat their values as resamples: of the whole model, and of each head.

    Changes are taken by their logarithm. There is none from a checkpoint of another trajectory.
    """
    steps = means["step"].values.tolist()
    for measure, field in _watched_weights():
        values = means[measure.name].sel(dict(field.where))
        axes = [axis for axis in values.dims if axis != "step"]
        for index in np.ndindex(*(values.sizes[axis] for axis in axes)):
            of_one = values.isel(dict(zip(axes, index, strict=True))).values.astype(float)
            if measure.level == "model":
                of_one = np.log10(np.maximum(of_one, _SMALLEST_CHANGE))
                of_one[[step in breaks.no_drift for step in steps]] = np.nan
                metric = Metric(field.trigger, field.trigger, ALL_SPLITS, resampled=False)
            else:
                component = Component(*index)
                name = f"{field.trigger}.{component}"
                metric = Metric(field.trigger, name, ALL_SPLITS, component.layer, component.head, resampled=False)
            yield _Series(metric, of_one, np.broadcast_to(of_one, (resamples, len(steps))))


def _field_on(measure: Measure, split: str) -> RowField:
    """Picks the watched field of a measure: the one for this split alone if there is one, else the one for all."""
    watched = [field for field in measure.fields if field.trigger is not None]
    return next((field for field in watched if field.where.get("split") == split), watched[0])


def _components(
    sums: SequenceSums, members: np.ndarray, counts_JxN: np.ndarray
) -> Iterator[tuple[Component, np.ndarray, np.ndarray]]:
    """Yields each component with its measure, such as the accuracy its ablation costs: values [C], resamples [J, C]."""
    whole, counts = sums.of_sequences(members)
    # Of the one kind of ablation, if it is a measure of ablations: [C, N, L] or [C, N, L, H].
    of_each = whole[:, :, 0] if "ablation" in sums.measure.own_axes else whole
    for index in np.ndindex(*of_each.shape[2:]):
        values, samples = resampled_ratios(
            counts_JxN[:, members], of_each[:, :, *index], counts.reshape(counts.shape[:2])
        )
        yield Component(*index), values, samples
