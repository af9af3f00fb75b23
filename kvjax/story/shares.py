"""Measures how the behaviour is shared among the components of a run (docs/definitions.md, "Phases and handovers")."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import xarray as xr
from scipy.special import ndtri

from kvjax.measure import registry
from kvjax.measure.sequence_sums import Counting, sequence_sums, source_names
from kvjax.measure.statistics import ranking
from kvjax.measure.uncertainty import LEVEL, percentile_interval, resampled_ratios
from kvjax.model.components import Component

# The carriers are the leader and those whose share is at least this part of the leader's.
LEADING = 1 / 2


@dataclasses.dataclass(frozen=True)
class Shares:
    """Carrier shares of X components, all heads or all MLPs of a run, at C checkpoints.

    A checkpoint at which nothing carries the behaviour has no shares: there they would be shares of noise.

    Attributes:
      components: the components.
      drops_CxX: accuracy that ablating each costs over the whole probe set.
      drop_samples_JxCxX: the same under resamples of sequences.
      shares_CxX: drops over the sum of the positive drops; NaN if nothing carries.
      samples_JxCxX: the same under resamples.
      carrier_CxX: the components with the largest share and those with at least `LEADING` of it, if their drops count.
    """

    components: tuple[Component, ...]
    drops_CxX: np.ndarray
    drop_samples_JxCxX: np.ndarray
    shares_CxX: np.ndarray
    samples_JxCxX: np.ndarray
    carrier_CxX: np.ndarray

    @property
    def carried_C(self) -> np.ndarray:
        """Checks at which checkpoints the behaviour has carriers, bool [C]."""
        return ~np.isnan(self.shares_CxX).all(axis=1)

    def carriers(self, checkpoint: int) -> list[int]:
        """Lists the carriers at a checkpoint, the largest share first."""
        order = ranking(np.nan_to_num(self.shares_CxX[checkpoint]))
        return [x for x in order.tolist() if self.carrier_CxX[checkpoint, x]]

    def share_interval(self, checkpoint: int, component: int) -> tuple[float, float]:
        """Forms the 95 % interval of a share over the resamples."""
        low, high = percentile_interval(self.samples_JxCxX[:, checkpoint, component, None])
        return float(low[0]), float(high[0])


def measured_drops(
    events: xr.Dataset, level: str, ablation: str, counts_JxN: np.ndarray
) -> tuple[tuple[Component, ...], np.ndarray, np.ndarray]:
    """Measures the accuracy that ablating each head or MLP costs over the whole probe set.

    Args:
      events: the sums per sequence of a sweep.
      level: `head` or `mlp`.
      ablation: the kind of ablation.
      counts_JxN: resamples of the sequences.

    Returns:
      The components; their drops [C, X]; the same under resamples [J, C, X].
    """
    measure = registry.declared(f"{level}_accuracy_drop")
    labels = {"ablation": (ablation,)}
    clean = registry.declared("answer_accuracy").sources
    sources = (*source_names(measure, labels), *clean)
    is_read = events["is_read"].values.astype(bool)
    counting = Counting(is_read, counts={"reads": is_read.sum(axis=1)}, groups={}, labels=labels)
    sums = sequence_sums(measure, {name: events[name.replace("/", "_")].values for name in sources}, counting)
    assert sums is not None  # every array it needs is among the sources above
    whole, counts = sums.of_sequences(np.arange(len(is_read)))
    places = list(np.ndindex(*whole.shape[3:]))
    costs = whole[:, :, 0].reshape(*whole.shape[:2], len(places))
    drops, samples = resampled_ratios(counts_JxN, costs, counts.reshape(*counts.shape[:2], 1))
    return tuple(Component(*place) for place in places), drops, samples


def carrier_shares(
    components: Sequence[Component],
    drops_CxX: np.ndarray,
    samples_JxCxX: np.ndarray,
    *,
    floor: float,
    above_chance_C: np.ndarray,
) -> Shares:
    """Divides the drops of components by the sum of the positive ones, at checkpoints that have a carrier.

    A drop counts if it reaches `floor` and is larger than noise: above its bootstrap deviation times the normal
    quantile of 5 % over all components and checkpoints (Bonferroni). If none counts, or the model answers at chance,
    nothing carries the behaviour.

    Args:
      components: X of them.
      drops_CxX: accuracy that ablating each costs.
      samples_JxCxX: the same under resamples.
      floor: smallest drop that means anything.
      above_chance_C: whether each checkpoint answers better than chance.
    """
    quantile = -ndtri((1 - LEVEL) / drops_CxX.size)
    counts_CxX = (drops_CxX >= floor) & (drops_CxX > quantile * samples_JxCxX.std(axis=0))
    carried_C = counts_CxX.any(axis=1) & above_chance_C
    shares = np.where(carried_C[:, None], _of_positive_sum(drops_CxX), np.nan)
    samples = np.where(carried_C[:, None], _of_positive_sum(samples_JxCxX), np.nan)
    leader = np.nan_to_num(shares).max(axis=1, keepdims=True)
    carrier_CxX = counts_CxX & carried_C[:, None] & (np.nan_to_num(shares) >= LEADING * leader)
    return Shares(tuple(components), drops_CxX, samples_JxCxX, shares, samples, carrier_CxX)


def _of_positive_sum(drops: np.ndarray) -> np.ndarray:
    """Divides drops [..., X] by the sum of the positive ones; NaN if there is none."""
    total = np.maximum(drops, 0.0).sum(axis=-1, keepdims=True)
    return np.divide(drops, total, out=np.full(drops.shape, np.nan), where=total > 0)
