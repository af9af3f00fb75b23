"""Labelled means of a sweep, and the per-read values and per-sequence sums they are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from kvjax.measure import registry
from kvjax.measure.between_checkpoints import change_from_previous
from kvjax.measure.sequence_sums import Counting, all_sequence_sums
from kvjax.model.sites import stage_names
from kvjax.sweeps.component_orders import component_orders
from kvjax.sweeps.probe_index import MARGIN_STATISTICS, POSITION_ROLES, ProbeIndex
from kvjax.sweeps.random_control import random_spreads
from kvjax.sweeps.residual_means import drifts, logistic_accuracies, movements, probe_nulls
from kvjax.sweeps.weights import weight_labels, weight_statistics
from kvjax.task.encoding import TOKEN_ROLES


def build_dataset(
    arrays: Mapping[str, np.ndarray],
    steps: Sequence[int],
    probe: ProbeIndex,
    *,
    reference: Mapping[str, np.ndarray] | None,
    weights: Sequence[Mapping[str, np.ndarray]],
    first: Mapping[str, np.ndarray] | None = None,
    ranked_by: str,
    moved: Sequence[Mapping[str, np.ndarray]] | None = None,
    logistic: Sequence[Mapping[str, np.ndarray] | None] = (),
) -> xr.Dataset:
    """Forms every declared measure of a sweep, labelled by step, split, stage, layer, head, ….

    Args:
      arrays: measured sums [C, N, …] by name, as `collect` returns them, for the checkpoints in `steps`.
      steps: the training steps, ascending.
      probe: the records.
      reference: the arrays of the checkpoint that drift is also measured to; that drift is NaN if None.
      weights: how each checkpoint's weights differ from others', see `WeightComparisons.compare`.
      first: the arrays of the run's first checkpoint; None if it is the first of these.
      ranked_by: the kind of ablation that ranks components.
      moved: how each checkpoint's states differ from others', see `compare_consecutive`; None if not asked.
      logistic: each checkpoint's logistic probes, None for those that have none; empty if not asked.

    Returns:
      A dataset; `split` runs over `all` and the splits. Drift is of the mean state at p_e and at s_e.
    """
    counting, members = probe.counting(arrays), probe.members()
    values: dict[str, np.ndarray] = _counts(probe, counting, members)
    for sums in all_sequence_sums(arrays, counting):
        measure = sums.measure
        if measure.by_split:
            values[measure.name] = np.stack([sums.means(own) for own in members], axis=1)
        else:
            values[measure.name] = sums.means(members[0])
        if measure.counted == "present":
            values[f"{measure.name}_count"] = np.stack([sums.totals(own) for own in members], axis=1).astype(int)
    values["answer_margin_summary"] = _margin_summary(arrays["read/margin"], members, probe.encoded.is_read)
    values |= random_spreads(arrays, counting, members)
    values |= probe_nulls(arrays, counting, members)
    values |= drifts(arrays, reference)
    values |= weight_statistics(arrays, weights, steps, first=first)
    if moved is not None:
        values |= movements(moved, counting, members)
    values |= logistic_accuracies(logistic, counting, members)
    labels = dict(counting.labels) | weight_labels(arrays)
    if "probe_accuracy" not in values:
        del labels["target"]
    attrs = {"conventions": "means over read events; see docs/definitions.md", "ranked_by": ranked_by}
    dataset = xr.Dataset(coords={"step": list(steps), **labels}, attrs=attrs)
    dataset = dataset.assign({name: _variable(name, found) for name, found in values.items()})
    orders = component_orders(dataset, ranked_by)
    dataset = dataset.assign({name: _variable(name, found) for name, found in orders.items()})
    if "probe_accuracy" in dataset:
        dataset["probe_accuracy"].attrs["controls"] = (
            "query_key at prediction and value at support are the token that stands there: controls, not findings"
        )
    return dataset.assign(_changes(dataset))


def _variable(name: str, values: np.ndarray) -> xr.Variable:
    """Labels the values of a measure, [C, splits, *axes] as far as it has these, in the file's order of dimensions."""
    measure = registry.declared(name)
    formed = [dim for dim in ("step", "split") if dim in measure.dims]
    attrs = {"long_name": measure.description, "units": measure.units}
    return xr.Variable((*formed, *measure.own_axes), values, attrs).transpose(*measure.dims)


def _counts(probe: ProbeIndex, counting: Counting, members: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Counts the reads and targets that means are over."""

    def by_split(counts: np.ndarray) -> np.ndarray:
        return np.stack([counts[own].sum(axis=0) for own in members])

    return {
        "read_count": by_split(counting.counts["reads"]),
        "token_role_count": by_split(counting.counts["role targets"]),
        "difficulty_count": by_split(counting.groups["difficulty"].sum(axis=2).T),
        "slice_count": by_split(counting.groups["axis_value"].sum(axis=2).T),
    }


def _changes(dataset: xr.Dataset) -> dict[str, xr.Variable]:
    """Subtracts the previous checkpoint from every measure of heads and MLPs."""
    changes = {}
    for measure in registry.MEASURES:
        if measure.level in ("head", "mlp") and measure.name in dataset:
            values = dataset[measure.name]
            meaning = f"change of {measure.name} from the previous checkpoint"
            attrs = {"long_name": meaning, "units": measure.units}
            changes[f"{measure.name}_change"] = xr.Variable(values.dims, change_from_previous(values.values), attrs)
    return changes


def build_events(
    arrays: Mapping[str, np.ndarray], steps: Sequence[int], probe: ProbeIndex, *, competitors: np.ndarray
) -> xr.Dataset:
    """Labels the per-read values and per-sequence sums that every mean and interval is made from.

    Beside them stand each sequence's split, each read's value on every axis of the benchmark, and its competitor.

    Args:
      arrays, steps, probe: as for `build_dataset`.
      competitors: [N, Q] token ids, see `FixedMargins`.
    """
    per_sequence = ("step", "sequence")
    stages = list(stage_names(arrays["mlp/write_norm"].shape[-1]))
    axes = registry.axes_of_sources()
    of_ablations = {"head": ("layer", "head"), "mlp": ("layer",)}
    dataset = xr.Dataset(coords={"step": list(steps), "sequence": list(probe.sample_ids), "stage": stages})
    dataset["split"] = (("sequence",), np.array(probe.splits)[probe.encoded.splits])
    dataset["is_read"] = (("sequence", "read"), probe.encoded.is_read)
    others = np.where(probe.encoded.is_read, probe.other_values, -1).astype(np.int32)
    meaning = "value positions before each read beside its support, -1 for none"
    dataset["other_values"] = (("sequence", "read"), others, {"long_name": meaning, "units": "1"})
    for axis, of_reads in probe.axis_values.items():
        values = np.where(probe.encoded.is_read, of_reads, -1).astype(np.int32)
        dataset[axis] = (("sequence", "read"), values, {"long_name": f"{axis} of each read, -1 for none", "units": "1"})
    meaning = "token id of the value that fixed_margin is to, -1 for none"
    dataset["competitor"] = (("sequence", "read"), competitors, {"long_name": meaning, "units": "1"})
    for name, values in arrays.items():
        kind = name.partition("/")[0]
        if kind == "read":  # positions that are no read hold no value
            values, own = np.where(probe.encoded.is_read, values.astype(np.float32), np.float32(np.nan)), ("read",)
        elif kind == "probe":
            both = values.reshape(*values.shape[:2], -1, len(stages))  # p_e alone, or p_e and s_e
            own = ("position_role", "stage") if both.shape[2] > 1 else ("stage",)
            values = both if both.shape[2] > 1 else both[:, :, 0]
        elif name in axes or kind in of_ablations:
            own = axes.get(name, of_ablations.get(kind))
        else:
            continue
        dataset[name.replace("/", "_")] = ((*per_sequence, *own), values, _event_attrs(kind, name))
    sizes = {"token_role": list(TOKEN_ROLES), "position_role": list(POSITION_ROLES)}
    sizes |= {axis: range(dataset.sizes[axis]) for axis in ("layer", "head")}
    return dataset.assign_coords({axis: list(labels) for axis, labels in sizes.items() if axis in dataset.sizes})


def _event_attrs(kind: str, name: str) -> dict[str, str]:
    """Describes an array of the events."""
    over = {"read": "of each read", "token": "summed over the tokens of a sequence"}
    long_name = f"{name.replace('/', ' ')}, {over.get(kind, 'summed over the reads of a sequence')}"
    return {"long_name": long_name, "units": registry.units_of_source(name)}


def _margin_summary(margins_CxNxQ: np.ndarray, members: Sequence[np.ndarray], is_read: np.ndarray) -> np.ndarray:
    """Describes the distribution of the margin over the reads of each split, [C, splits, statistics]."""
    summary = np.full((len(margins_CxNxQ), len(members), len(MARGIN_STATISTICS)), np.nan)
    for z, own in enumerate(members):
        margins = margins_CxNxQ[:, own][:, is_read[own]].astype(np.float64)  # [C, events]
        if not margins.shape[1]:
            continue
        summary[:, z] = np.stack(
            [
                margins.mean(axis=1),
                margins.std(axis=1),
                *np.percentile(margins, [10, 50, 90], axis=1),
                (margins > 0).mean(axis=1),
            ],
            axis=1,
        )
    return summary
