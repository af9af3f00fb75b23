"""Measures of the residual stream at each stage: logit lens and trained linear probes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvjax.measure.declaration import Measure, RowField

if TYPE_CHECKING:
    import numpy as np

PROBE_TARGETS = ("query_key", "value", "stale_value")


def _by_target_and_position(*right_CxNxG: np.ndarray) -> np.ndarray:
    """Arranges right answers at both positions of each target: [C, N, targets, positions, S]."""
    import numpy as np

    stacked = np.stack(right_CxNxG, axis=2)
    return stacked.reshape(*stacked.shape[:3], 2, -1)


def _by_position(right_CxNxG: np.ndarray) -> np.ndarray:
    """Arranges right answers at both positions: [C, N, positions, S]."""
    return right_CxNxG.reshape(*right_CxNxG.shape[:2], 2, -1)


def _lens(name: str, source: str, meaning: str, *, field: str | None = None, margin: bool = False) -> Measure:
    return Measure(
        name,
        "stage",
        "logits" if margin else "1",
        f"logit lens: {meaning}",
        "mean" if margin else "rate",
        sources=(f"lens/{source}",),
        compute=lambda reads: reads.lens[source],
        fields=(RowField(field or f"{name}_by_layer"),),
    )


LENS: tuple[Measure, ...] = (
    _lens("lens_answer_accuracy", "answer_correct", "answer among values, at p_e"),
    _lens("lens_query_key_accuracy", "query_key_correct", "read key among keys, at k_e"),
    _lens("lens_support_value_accuracy", "support_value_correct", "value among values, at s_e"),
    _lens("lens_answer_margin", "answer_margin", "answer margin, at p_e", field="answer_margin_by_layer", margin=True),
)


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


def _binary_fields(suffix: str = "") -> tuple[RowField, ...]:
    at = {"": "prediction", "_at_support": "support"}
    return tuple(
        RowField(f"probe_current_vs_stale_binary{where}{suffix}_by_layer", {"position_role": position})
        for where, position in at.items()
    )


PROBES: tuple[Measure, ...] = (
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
        "probe_current_vs_stale_binary",
        "stage",
        "1",
        "share of reads at which the probe trained to tell current from stale values does; chance 0.5",
        "rate",
        axes=("position_role", "stage"),
        sources=("probe/current_vs_stale_binary",),
        combine=_by_position,
        counted="stale",
        fields=_binary_fields(),
    ),
    Measure(
        "probe_current_vs_stale_binary_null",
        "stage",
        "1",
        "95th percentile of that share with permuted fit labels",
        "statistic",
        axes=("position_role", "stage"),
        fields=_binary_fields("_null"),
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
