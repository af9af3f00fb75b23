"""Declares every measure of a sweep once: its name, units, origin, and where it is shown.

One loop over `MEASURES` gives means, intervals, full-split evaluations, trajectories of birth windows, netCDF
attributes, row schemas and figure labels. A new per-read or per-head measure is one more declaration with `compute`.
This module imports the standard library alone, so configs and schemas can be made from it (docs/definitions.md lists
the same declarations; a test holds the two together).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from kvjax.measure.declaration import LEVEL_AXES, Column, Counted, Level, Measure, RowField, Table

if TYPE_CHECKING:
    import jax
    import numpy as np

ALL_SPLITS = "all"  # the whole probe set, beside its splits
BIRTH_SPLIT = "validation_iid"  # the split that birth thresholds were written for
HELDOUT_SPLIT = "heldout_pairs"


def declared(name: str) -> Measure:
    """Looks up a measure by name.

    Raises:
      KeyError: no measure has the name.
    """
    for measure in MEASURES:
        if measure.name == name:
            return measure
    raise KeyError(name)


def computed(level: Level) -> list[Measure]:
    """Lists the measures of a level that declare their own device function."""
    return [measure for measure in MEASURES if measure.level == level and measure.compute is not None]


def computed_sources() -> frozenset[str]:
    """Names every array that a declared device function makes."""
    return frozenset(source for measure in MEASURES if measure.compute is not None for source in measure.sources)


def computed_names() -> tuple[str, ...]:
    """Names every measure that declares its own device function."""
    return tuple(measure.name for measure in MEASURES if measure.compute is not None)


def row_fields(table: Table) -> Iterator[tuple[Measure, RowField]]:
    """Yields every field of a table's rows with the measure it shows."""
    for measure in MEASURES:
        if measure.table == table:
            for field in measure.fields:
                yield measure, field


def triggers() -> Iterator[tuple[Measure, RowField]]:
    """Yields every field that a kind of birth-window trigger watches, with its measure."""
    for measure in MEASURES:
        for field in measure.fields:
            if field.trigger is not None:
                yield measure, field


def units_of_source(source: str) -> str:
    """Looks up the units of a measured array, "1" if no measure with units is formed from it."""
    kind, _, quantity = source.partition("/")
    pattern = f"{kind}/{{ablation}}/{quantity.rpartition('/')[2]}" if "/" in quantity else source
    units = {m.units for m in MEASURES if pattern in m.sources}
    return next(iter(units - {"1"}), "1")


def _at_both_positions(prediction: np.ndarray, support: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.stack([prediction, support], axis=2)


def _by_target_and_position(*right_CxNxG: np.ndarray) -> np.ndarray:
    """Arranges right answers at both positions of each target: [C, N, targets, positions, S]."""
    import numpy as np

    stacked = np.stack(right_CxNxG, axis=2)
    return stacked.reshape(*stacked.shape[:3], 2, -1)


def _added_by_mlps(margin_CxNxS: np.ndarray) -> np.ndarray:
    """Subtracts each layer's lens margin before the MLP from that after it; stages alternate after the embedding."""
    return margin_CxNxS[..., 2:-1:2] - margin_CxNxS[..., 1:-1:2]


def _read(name: str, units: str, description: str, compute: Callable[[Any], jax.Array], **more: Any) -> Measure:
    return Measure(name, "read", units, description, compute=compute, **more)


def _shown(name: str, column: Column | None = None) -> tuple[RowField, ...]:
    return (RowField(name, delta=True, trigger=name, column=column),)


_BEHAVIOUR = (
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
        lambda reads: reads.selectivities[0],
        sources=("read/key_selectivity",),
        counted="present",
        split_metric=True,
        label="key selectivity",
        panel="attention",
        fields=_shown("key_selectivity"),
    ),
    _read(
        "recency_selectivity",
        "1",
        "share of the current value in that head's key part",
        lambda reads: reads.selectivities[1],
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
        by_split=False,
        sources=("read/correct",),
        groups="difficulty",
        fields=(RowField("difficulty_accuracy"),),
    ),
    Measure(
        "slice_accuracy",
        "read",
        "1",
        "answer accuracy of the reads with this value of an axis",
        "rate",
        axes=("axis_value",),
        by_split=False,
        sources=("read/correct",),
        groups="axis_value",
    ),
)


def _token(name: str, units: str, description: str, source: str, **more: Any) -> Measure:
    return Measure(name, "token", units, description, sources=(source,), **more)


_TOKENS = (
    _token(
        "loss",
        "nats",
        "cross-entropy of the next token, over non-pad targets",
        "token/loss",
        counted="targets",
        interval=False,
        fields=(RowField("loss", delta=True, column=Column("loss", "6.3f")),),
    ),
    _token(
        "token_accuracy",
        "1",
        "share of targets predicted right",
        "token/role_correct",
        kind="rate",
        counted="targets",
        fields=(RowField("token_accuracy"),),
    ),
    _token(
        "token_role_accuracy",
        "1",
        "share of targets of a role predicted right",
        "token/role_correct",
        kind="rate",
        axes=("token_role",),
        counted="role targets",
        fields=(RowField("token_role_accuracy"),),
    ),
)


def _lens(name: str, source: str, meaning: str, *, field: str | None = None, margin: bool = False) -> Measure:
    return Measure(
        name,
        "stage",
        "logits" if margin else "1",
        f"logit lens: {meaning}",
        "mean" if margin else "rate",
        sources=(f"lens/{source}",),
        fields=(RowField(field or f"{name}_by_layer"),),
    )


_LENS = (
    _lens("lens_answer_accuracy", "answer_correct", "answer among values, at p_e"),
    _lens("lens_query_key_accuracy", "query_key_correct", "read key among keys, at k_e"),
    _lens("lens_support_value_accuracy", "support_value_correct", "value among values, at s_e"),
    _lens("lens_answer_margin", "answer_margin", "answer margin, at p_e", field="answer_margin_by_layer", margin=True),
)


def _attention(name: str, field: str, *, units: str = "1", counted: Counted = "reads") -> Measure:
    return Measure(
        f"head_{name}",
        "head",
        units,
        f"mean {name} of a head",
        sources=(f"head/{name}",),
        counted=counted,
        compute=lambda reads: reads.attention[name],
        fields=(RowField(field),),
    )


def _drops(component: Literal["head", "mlp"]) -> Iterator[Measure]:
    """Declares the cost of ablating components; rows show zero ablation without a suffix, and no random control."""
    for quantity, units, kind, source in (
        ("accuracy", "1", "difference of rates", "correct"),
        ("margin", "logits", "mean", "margin"),
    ):
        watched = quantity == "accuracy"
        yield Measure(
            f"{component}_{quantity}_drop",
            component,
            units,
            f"clean minus ablated answer {quantity}",
            kind,
            axes=("ablation", *LEVEL_AXES[component]),
            sources=(f"{component}/{{ablation}}/{source}",),
            lost_from=f"answer_{quantity}",
            fields=(
                RowField(
                    f"{quantity}_drop",
                    {"ablation": "zero"},
                    delta=watched,
                    trigger=f"{component}_accuracy_drop" if watched else None,
                ),
                RowField(f"{quantity}_drop_mean", {"ablation": "mean"}),
                RowField(f"{quantity}_drop_resample", {"ablation": "resample"}),
            ),
        )


def _attribution(term: str, level: Level) -> Measure:
    return Measure(
        f"{term}_direct_logit_attribution",
        level,
        "logits",
        f"what the {term} adds to logit(answer) - mean logit over values",
        sources=(f"attribution/{term}",),
        interval=False,
        fields=(RowField("direct_logit_attribution"),) if level in ("head", "mlp") else (),
    )


_COMPONENTS = (
    _attention("query_attention", "query_attention_mean"),
    _attention("support_attention", "support_attention_mean"),
    _attention("current_value_attention", "current_value_attention_mean"),
    # A read whose support overwrote nothing has no stale value to attend to.
    _attention("stale_attention", "stale_attention_mean", counted="stale"),
    _attention("binding_attention", "binding_attention_mean"),
    _attention("attention_entropy", "attention_entropy", units="nats"),
    *_drops("head"),
    *_drops("mlp"),
    Measure(
        "mlp_write_norm",
        "mlp",
        "1",
        "L2 norm of an MLP's output",
        axes=("position_role", "layer"),
        sources=("mlp/write_norm", "mlp/write_norm_support"),
        combine=_at_both_positions,
        interval=False,
        fields=(
            RowField("write_norm_mean", {"position_role": "prediction"}),
            RowField("write_norm_support_mean", {"position_role": "support"}),
        ),
    ),
    Measure(
        "mlp_answer_margin_delta",
        "mlp",
        "logits",
        "lens margin an MLP adds",
        sources=("lens/answer_margin",),
        combine=_added_by_mlps,
        interval=False,
        fields=(RowField("answer_margin_delta_mean"),),
    ),
    _attribution("embedding", "model"),
    _attribution("final_norm_bias", "model"),
    _attribution("head", "head"),
    _attribution("attn_bias", "layer"),
    _attribution("mlp", "mlp"),
)

PROBE_TARGETS = ("query_key", "value", "stale_value")
_PROBE_AXES = ("target", "position_role", "stage")

# Field of the row -> the probe it shows: target and position (p_e or s_e).
_PROBE_CELLS = {
    "probe_query_key": ("query_key", "prediction"),
    "probe_query_key_at_support": ("query_key", "support"),
    "probe_support_value": ("value", "support"),
    "probe_answer_value": ("value", "prediction"),
    "probe_stale_value": ("stale_value", "prediction"),
    "probe_stale_value_at_support": ("stale_value", "support"),
}


def _probe_fields(suffix: str = "") -> tuple[RowField, ...]:
    return tuple(
        RowField(f"{name}{suffix}_by_layer", {"target": target, "position_role": position})
        for name, (target, position) in _PROBE_CELLS.items()
    )


_PROBES = (
    Measure(
        "probe_accuracy",
        "stage",
        "1",
        "accuracy of a trained ridge probe of the target",
        "rate",
        axes=_PROBE_AXES,
        sources=tuple(f"probe/{target}" for target in PROBE_TARGETS),
        combine=_by_target_and_position,
        counted=("reads", "reads", "stale"),
        fields=_probe_fields(),
    ),
    Measure(
        "probe_null",
        "stage",
        "1",
        "95th percentile of the accuracy with permuted fit labels",
        "statistic",
        axes=_PROBE_AXES,
        fields=_probe_fields("_null"),
    ),
    Measure(
        "probe_current_vs_stale",
        "stage",
        "1",
        "share of reads whose value probe at p_e ranks the current value above the stale one; chance 0.5",
        "rate",
        sources=("probe/current_vs_stale",),
        counted="stale",
        fields=(RowField("probe_current_vs_stale_by_layer"),),
    ),
    Measure(
        "probe_current_vs_stale_null",
        "stage",
        "1",
        "95th percentile of that share with permuted fit labels",
        "statistic",
        fields=(RowField("probe_current_vs_stale_null_by_layer"),),
    ),
    Measure(
        "logistic_probe_accuracy",
        "stage",
        "1",
        "accuracy of a multinomial logistic probe of the target",
        "statistic",
        axes=_PROBE_AXES,
    ),
)


def _between(other: Literal["previous", "reference"]) -> Iterator[Measure]:
    """Declares the distances between the states of a checkpoint and those of another."""
    suffix = "" if other == "previous" else "_to_reference"
    at = ("position_role", "stage")
    yield Measure(
        f"residual_drift{suffix}",
        "stage",
        "1",
        f"1 - cosine of the mean state at p_e or s_e with that of the {other} checkpoint",
        "statistic",
        axes=at,
        fields=(
            RowField(
                f"residual_drift{suffix}_by_layer",
                {"position_role": "prediction"},
                trigger="residual_drift" if other == "previous" else None,
            ),
        ),
    )
    yield Measure(
        f"residual_event_drift{suffix}",
        "stage",
        "1",
        f"mean over reads of 1 - cosine of the state at p_e or s_e with that of the {other} checkpoint",
        "statistic",
        axes=at,
    )
    yield Measure(
        f"residual_cka{suffix}",
        "stage",
        "1",
        f"linear CKA of the states of all reads with those of the {other} checkpoint",
        "statistic",
        axes=at,
        by_split=False,
    )


def _order(name: str, description: str, trigger: str | None = None) -> Measure:
    """Statistics that rows alone have: how the order of components changes from checkpoint to checkpoint."""
    return Measure(
        name, "model", "1", description, "statistic", by_split=False, fields=(RowField(name, trigger=trigger),)
    )


_DYNAMICS = (
    *_between("previous"),
    *_between("reference"),
    _order(
        "head_rank_correlation_prev",
        "Spearman correlation of the heads' accuracy drops with the previous checkpoint's",
        trigger="head_rank_correlation",
    ),
    _order(
        "mlp_rank_correlation_prev", "Spearman correlation of the MLPs' accuracy drops with the previous checkpoint's"
    ),
    _order("head_turnover", "share of the top heads that left or joined since the previous checkpoint"),
    _order("mlp_turnover", "share of the top MLP that left or joined since the previous checkpoint"),
)


def _count(name: str, units: str, description: str, *axes: str, **more: Any) -> Measure:
    return Measure(name, "read", units, description, "count", axes=axes, **more)


_COUNTS = (
    _count("read_count", "events", "number of read events", by_step=False),
    _count("difficulty_count", "events", "number of read events", "difficulty", by_split=False, by_step=False),
    _count("slice_count", "events", "number of read events", "axis_value", by_split=False, by_step=False),
    _count("token_role_count", "tokens", "number of targets of a role", "token_role", by_step=False),
    _count("key_selectivity_count", "events", "number of reads whose key_selectivity is defined"),
    _count("recency_selectivity_count", "events", "number of reads whose recency_selectivity is defined"),
)

MEASURES: tuple[Measure, ...] = (
    *(*_BEHAVIOUR, *_TOKENS, *_LENS, *_COMPONENTS),
    *(*_PROBES, *_DYNAMICS, *_COUNTS),
)
