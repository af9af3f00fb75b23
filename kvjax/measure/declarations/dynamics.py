"""Measures of how a checkpoint differs from another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from kvjax.measure.declaration import Measure, RowField


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
        f"linear CKA of the states of the reads with those of the {other} checkpoint",
        "statistic",
        axes=at,
    )


def _order(name: str, description: str, trigger: str | None = None) -> Measure:
    """Declares how the order of components changes from checkpoint to checkpoint."""
    return Measure(name, "model", "1", description, "statistic", fields=(RowField(name, trigger=trigger),))


MEASURES: tuple[Measure, ...] = (
    *_between("previous"),
    *_between("reference"),
    # The component tables show the ranks of the whole probe set.
    Measure("head_rank", "head", "1", "place of a head by accuracy drop, from 1", "statistic"),
    Measure("mlp_rank", "mlp", "1", "place of an MLP by accuracy drop, from 1", "statistic"),
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
