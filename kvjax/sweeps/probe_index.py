"""What means of a sweep are formed over: the records' splits, and which sums each mean is made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from kvjax.task.encoding import TOKEN_ROLES, EncodedRecords
from kvjax.task.stream import EVENT_AXES, SEQUENCE_AXES, Record

ALL_SPLITS = "all"  # the whole probe set, beside its splits

READ_MEANS = {
    "answer_accuracy": ("read/correct", "share of reads whose argmax over the vocabulary is the answer", "1"),
    "answer_margin": ("read/margin", "logit of the answer minus the largest of the other values", "logits"),
    "answer_entropy": ("read/entropy", "entropy of the prediction over the vocabulary", "nats"),
    "answer_confidence": ("read/confidence", "probability of the answer", "1"),
    "q": ("read/q", "largest attention of any head from p_e to the read's key token", "1"),
    "r": ("read/r", "largest attention of any head from p_e to the support value", "1"),
    "key_selectivity": ("read/key_selectivity", "largest share of the read key in a head's attention to values", "1"),
    "recency_selectivity": ("read/recency_selectivity", "share of the current value in that head's key part", "1"),
}  # fmt: skip

LENS_MEANS = {
    "lens_answer_accuracy": ("lens/answer_correct", "logit lens: answer among values, at p_e", "1"),
    "lens_query_key_accuracy": ("lens/query_key_correct", "logit lens: read key among keys, at k_e", "1"),
    "lens_support_value_accuracy": (
        "lens/support_value_correct",
        "logit lens: value among values, at s_e",
        "1",
    ),
    "lens_answer_margin": ("lens/answer_margin", "logit lens: answer margin, at p_e", "logits"),
}

POSITION_ROLES = ("prediction", "support")  # p_e and s_e

DIFFICULTIES = ("easy", "hard")


@dataclasses.dataclass(frozen=True)
class ProbeIndex:
    """What forming means needs to know of the probe set.

    Attributes:
      sample_ids: of the N records, in order.
      splits: the split names, in order.
      encoded: the records as arrays.
      difficulty: [N] easy or hard.
      axis_values: axis -> [N, Q] int, the value each read falls under.
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
        """Returns the index of a probe set's records."""
        axis_values = {}
        for axis in (*SEQUENCE_AXES, *EVENT_AXES):
            values = np.zeros(encoded.is_read.shape, int)
            for n, record in enumerate(records):
                events = record["query_events"]
                values[n, : len(events)] = (
                    [event[axis] for event in events] if axis in EVENT_AXES else record["axes"][axis]
                )
            axis_values[axis] = values
        return cls(
            sample_ids=tuple(record["sample_id"] for record in records),
            splits=tuple(splits),
            encoded=encoded,
            difficulty=np.array([difficulty[record["sample_id"]] for record in records]),
            axis_values=axis_values,
        )

    def slices(self) -> list[tuple[str, np.ndarray]]:
        """Returns every value of every axis, as `axis=value`, with the reads that fall under it, bool [N, Q]."""
        is_read = self.encoded.is_read
        return [
            (f"{axis}={value}", is_read & (values == value))
            for axis, values in self.axis_values.items()
            for value in np.unique(values[is_read])
        ]

    def targets_by_role(self) -> np.ndarray:
        """Returns the number of targets of each token role in each record, [N, roles]."""
        roles = self.encoded.token_roles[:, 1:]
        return np.stack([(roles == role).sum(axis=1) for role in range(len(TOKEN_ROLES))], axis=1)

    def split_weights(self) -> np.ndarray:
        """Returns which records each of `all` and the splits holds, bool [1 + splits, N]."""
        own = self.encoded.splits == np.arange(len(self.splits))[:, None]
        return np.concatenate([np.ones((1, len(self.encoded)), bool), own])


def mean_over_reads(
    values_CxNxQ: np.ndarray, groups_ZxN: np.ndarray, is_read_NxQ: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean over the reads of each group of records, and their number, [C, Z] each.

    Reads whose value is NaN are left out; the mean of none is NaN.
    """
    values = values_CxNxQ.astype(np.float64)
    counted = is_read_NxQ & ~np.isnan(values)
    totals = np.einsum("cn,zn->cz", np.where(counted, values, 0.0).sum(axis=-1), groups_ZxN)
    counts = np.einsum("cn,zn->cz", counted.sum(axis=-1), groups_ZxN)
    return ratio(totals, counts), counts


def ratio(totals: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns totals over counts; NaN where nothing counts."""
    return np.divide(totals, counts, out=np.full(totals.shape, np.nan), where=counts != 0)
