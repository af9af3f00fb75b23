"""Measures of every predicted token."""

from __future__ import annotations

from typing import Any

from kvjax.measure.declaration import Column, Measure, RowField


def _token(name: str, units: str, description: str, source: str, **more: Any) -> Measure:
    return Measure(name, "token", units, description, sources=(source,), **more)


MEASURES: tuple[Measure, ...] = (
    _token(
        "loss",
        "nats",
        "cross-entropy of the next token, over non-pad targets",
        "token/loss",
        compute=lambda reads: reads.next_token[0],
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
        compute=lambda reads: reads.next_token[1],
        axes=("token_role",),
        counted="role targets",
        fields=(RowField("token_role_accuracy"),),
    ),
)
