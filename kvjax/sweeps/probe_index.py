"""Indexes a probe set for means: splits, groups of reads, counts, and the labels of every axis."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from kvjax.measure.declarations.residual import PROBE_TARGETS
from kvjax.measure.registry import ALL_SPLITS
from kvjax.measure.sequence_sums import Counting
from kvjax.model.sites import stage_names
from kvjax.sweeps.settings import ABLATIONS
from kvjax.task.encoding import RELATION_GROUPS, TOKEN_ROLES, EncodedRecords, copy_axes
from kvjax.task.stream import EVENT_AXES, SEQUENCE_AXES, Record
from kvjax.task.vocabulary import PAD_ID

POSITION_ROLES = ("prediction", "support")  # p_e and s_e

DIFFICULTIES = ("easy", "hard")

IID_SPLITS = ("train", "validation_iid", "test_iid")  # of one distribution

# The last value that an axis is sliced by holds all larger ones.
_LAST_SLICE = {"earlier_answers": 2}

MARGIN_STATISTICS = ("mean", "std", "p10", "p50", "p90", "share_positive")


@dataclasses.dataclass(frozen=True)
class ProbeIndex:
    """A probe set's records, or a split's, in the order of the measured arrays.

    Attributes:
      sample_ids: of the N records, in order.
      splits: the split names, in order.
      encoded: the records as arrays.
      difficulty: [N] easy or hard.
      axis_values: axis -> [N, Q] int, the value of each read.
    """

    sample_ids: tuple[str, ...]
    splits: tuple[str, ...]
    encoded: EncodedRecords
    difficulty: np.ndarray
    axis_values: Mapping[str, np.ndarray]

    @classmethod
    def of(
        cls,
        records: Sequence[Record],
        encoded: EncodedRecords,
        splits: Sequence[str],
        difficulty: Mapping[str, str],
    ) -> ProbeIndex:
        """Indexes records; `difficulty` tags each by sample id."""
        axis_values = {}
        for axis in (*SEQUENCE_AXES, *EVENT_AXES):
            values = np.zeros(encoded.is_read.shape, int)
            for n, record in enumerate(records):
                events = record["query_events"]
                values[n, : len(events)] = (
                    [event[axis] for event in events] if axis in EVENT_AXES else record["axes"][axis]
                )
            axis_values[axis] = values
        axis_values |= copy_axes(encoded)
        return cls(
            sample_ids=tuple(record["sample_id"] for record in records),
            splits=tuple(splits),
            encoded=encoded,
            difficulty=np.array([difficulty[record["sample_id"]] for record in records]),
            axis_values=axis_values,
        )

    def slices(self) -> dict[str, np.ndarray]:
        """Groups the reads by every value of every axis, `axis=value` -> bool [N, Q]; `axis=2+` holds 2 and more."""
        is_read = self.encoded.is_read
        slices = {}
        for axis, values in self.axis_values.items():
            last = _LAST_SLICE.get(axis)
            grouped = values if last is None else np.minimum(values, last)
            for value in np.unique(grouped[is_read]):
                slices[f"{axis}={value}{'+' if value == last else ''}"] = is_read & (grouped == value)
        return slices

    @functools.cached_property
    def other_values(self) -> np.ndarray:
        """Counts the value positions before each read beside its support, [N, Q]."""
        return np.isin(self.encoded.relations, RELATION_GROUPS["value"]).sum(axis=-1) - 1

    def members(self) -> list[np.ndarray]:
        """Lists the indices of the records of `all` and of each split."""
        everyone = np.arange(len(self.encoded))
        return [everyone, *(np.flatnonzero(self.encoded.splits == split) for split in range(len(self.splits)))]

    def counting(self, arrays: Mapping[str, np.ndarray]) -> Counting:
        """Counts the divisors of means of measured arrays, and labels their axes."""
        is_read, slices = self.encoded.is_read, self.slices()
        difficulties = np.stack([(self.difficulty == tag)[:, None] & is_read for tag in DIFFICULTIES])
        iid_N = np.isin(np.array(self.splits)[self.encoded.splits], IID_SPLITS)
        roles = self.encoded.token_roles[:, 1:]
        of_role = np.stack([(roles == role).sum(axis=1) for role in range(len(TOKEN_ROLES))], axis=1)
        n_layers = arrays["mlp/write_norm"].shape[-1]
        return Counting(
            is_read=is_read,
            counts={
                "reads": is_read.sum(axis=1),
                "contrasted": (is_read & (self.other_values > 0)).sum(axis=1),
                "stale": (is_read & (self.encoded.stale_values != PAD_ID)).sum(axis=1),
                "targets": of_role.sum(axis=1),
                "role targets": of_role,
            },
            groups={
                "difficulty": difficulties,
                "iid_difficulty": difficulties & iid_N[None, :, None],
                "axis_value": np.stack(list(slices.values())),
            },
            labels={
                "split": [ALL_SPLITS, *self.splits],
                "stage": list(stage_names(n_layers)),
                "layer": list(range(n_layers)),
                "head": list(range(arrays["head/query_attention"].shape[-1])),
                "ablation": [kind for kind in ABLATIONS if f"head/{kind}/correct" in arrays],
                "position_role": list(POSITION_ROLES),
                "target": list(PROBE_TARGETS),
                "token_role": list(TOKEN_ROLES),
                "difficulty": list(DIFFICULTIES),
                "margin_statistic": list(MARGIN_STATISTICS),
                "axis_value": list(slices),
            },
        )
