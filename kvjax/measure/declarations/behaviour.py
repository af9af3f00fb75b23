"""Measures of behaviour at the reads, and the counts they are over."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvjax.measure.declaration import HELDOUT_SPLIT, Column, Measure, RowField

if TYPE_CHECKING:
    import jax


def _read(name: str, units: str, description: str, compute: Callable[[Any], jax.Array], **more: Any) -> Measure:
    return Measure(name, "read", units, description, compute=compute, **more)


def _shown(name: str, column: Column | None = None) -> tuple[RowField, ...]:
    return (RowField(name, delta=True, trigger=name, column=column),)


MEASURES: tuple[Measure, ...] = (
    _read(
        "answer_accuracy",
        "1",
        "share of reads whose argmax over the vocabulary is the answer",
        lambda reads: reads.correct,
        kind="rate",
        sources=("read/correct",),
        split_metric=True,
        label="answer accuracy",
        fields=(
            *_shown("answer_accuracy", Column("accuracy", "9.3f")),
            RowField(
                "heldout_answer_accuracy",
                {"split": HELDOUT_SPLIT},
                delta=True,
                trigger="heldout_answer_accuracy",
                column=Column("held-out", "9.3f"),
            ),
        ),
    ),
    _read(
        "q",
        "1",
        "largest attention of any head from p_e to the read's key token",
        lambda reads: reads.attention["query_attention"].max(axis=(0, 2)),
        sources=("read/q",),
        split_metric=True,
        fields=_shown("q"),
    ),
    _read(
        "r",
        "1",
        "largest attention of any head from p_e to the support value",
        lambda reads: reads.attention["support_attention"].max(axis=(0, 2)),
        sources=("read/r",),
        split_metric=True,
        label="r: attention to the support",
        panel="attention",
        fields=_shown("r", Column("r", "6.3f")),
    ),
    _read(
        "answer_margin",
        "logits",
        "logit of the answer minus the largest of the other values",
        lambda reads: reads.margin,
        sources=("read/margin",),
        split_metric=True,
        label="answer margin",
        fields=(
            RowField("answer_margin", delta=True, column=Column("margin", "9.2f")),
            RowField("w", delta=True, trigger="w"),
        ),
    ),
    _read(
        "key_selectivity",
        "1",
        "largest share of the read key in a head's attention to values",
        lambda reads: reads.selectivities["key"],
        sources=("read/key_selectivity",),
        counted="present",
        split_metric=True,
        label="key selectivity",
        panel="attention",
        fields=_shown("key_selectivity"),
    ),
    _read(
        "key_selectivity_null",
        "1",
        "largest share of another key of the stream in a head's attention to values",
        lambda reads: reads.selectivities["key_null"],
        sources=("read/key_selectivity_null",),
        counted="present",
        split_metric=True,
        label="key selectivity, null",
        panel="attention",
        fields=(RowField("key_selectivity_null"),),
    ),
    _read(
        "recency_selectivity",
        "1",
        "share of the current value in that head's key part",
        lambda reads: reads.selectivities["recency"],
        sources=("read/recency_selectivity",),
        counted="present",
        split_metric=True,
        label="recency selectivity",
        panel="attention",
        fields=_shown("recency_selectivity"),
    ),
    _read(
        "answer_entropy",
        "nats",
        "entropy of the prediction over the vocabulary",
        lambda reads: reads.distribution[0],
        sources=("read/entropy",),
        fields=(RowField("answer_entropy", delta=True),),
    ),
    _read(
        "answer_confidence",
        "1",
        "probability of the answer",
        lambda reads: reads.distribution[1],
        sources=("read/confidence",),
        fields=(RowField("answer_confidence", delta=True),),
    ),
    _read(
        "answer_loss",
        "nats",
        "minus the log probability of the answer",
        lambda reads: reads.answer_loss,
        sources=("read/answer_loss",),
        split_metric=True,
        label="answer loss",
        fields=_shown("answer_loss"),
    ),
    _read(
        "answer_logit",
        "logits",
        "logit of the answer",
        lambda reads: reads.answer_logits[0],
        sources=("read/answer_logit",),
        split_metric=True,
        # No trigger: a constant added to all logits moves it and changes no prediction.
        fields=(RowField("answer_logit", delta=True),),
    ),
    _read(
        "answer_logit_centred",
        "logits",
        "logit of the answer minus the mean logit over values",
        lambda reads: reads.answer_logits[1],
        sources=("read/answer_logit_centred",),
        split_metric=True,
        label="centred answer logit",
        fields=_shown("answer_logit_centred"),
    ),
    # The sweep forms it when it knows the reference (`kvjax.sweeps.fixed_margin`).
    Measure(
        "fixed_margin",
        "read",
        "logits",
        "logit of the answer minus that of the value that competes with it at the reference checkpoint",
        sources=("read/fixed_margin",),
        split_metric=True,
        label="fixed margin",
        fields=_shown("fixed_margin"),
    ),
    Measure(
        "answer_margin_summary",
        "read",
        "logits",
        "distribution of the answer margin over reads",
        "statistic",
        axes=("margin_statistic",),
        fields=(RowField("answer_margin_summary"),),
    ),
    Measure(
        "difficulty_accuracy",
        "read",
        "1",
        "answer accuracy",
        "rate",
        axes=("difficulty",),
        sources=("read/correct",),
        groups="difficulty",
        fields=(RowField("difficulty_accuracy"),),
    ),
    Measure(
        "iid_difficulty_accuracy",
        "read",
        "1",
        "answer accuracy on the splits of the training distribution",
        "rate",
        axes=("difficulty",),
        by_split=False,
        sources=("read/correct",),
        groups="iid_difficulty",
        fields=(
            RowField("easy_iid_accuracy", {"difficulty": "easy"}),
            RowField("hard_iid_accuracy", {"difficulty": "hard"}),
        ),
    ),
    Measure(
        "slice_accuracy",
        "read",
        "1",
        "answer accuracy of the reads with this value of an axis",
        "rate",
        axes=("axis_value",),
        sources=("read/correct",),
        groups="axis_value",
    ),
)


def _count(name: str, units: str, description: str, *axes: str, **more: Any) -> Measure:
    return Measure(name, "read", units, description, "count", axes=axes, **more)


COUNTS: tuple[Measure, ...] = (
    _count("read_count", "events", "number of read events", by_step=False),
    _count("difficulty_count", "events", "number of read events", "difficulty", by_step=False),
    _count("slice_count", "events", "number of read events", "axis_value", by_step=False),
    _count("token_role_count", "tokens", "number of targets of a role", "token_role", by_step=False),
    _count("key_selectivity_count", "events", "number of reads whose key_selectivity is defined"),
    _count("key_selectivity_null_count", "events", "number of reads whose key_selectivity_null is defined"),
    _count("recency_selectivity_count", "events", "number of reads whose recency_selectivity is defined"),
)
