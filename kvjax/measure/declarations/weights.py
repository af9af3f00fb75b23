"""Measures of weights alone: spectra of heads and MLPs at a checkpoint, and how tensors change between checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from kvjax.measure.declaration import Level, Measure, RowField

_MATRICES = ("qk", "ov")  # W_QK and W_OV of a head


def _weights(name: str, level: Level, description: str, *axes: str, fields: tuple[RowField, ...] = ()) -> Measure:
    return Measure(name, level, "1", description, "statistic", axes=axes, by_split=False, fields=fields)


def _of_heads(name: str, description: str, suffix: str, *, watched: bool = False) -> Measure:
    """Declares a number of every head's W_QK and W_OV."""
    names = {matrix: f"{matrix}_{suffix}" for matrix in _MATRICES}
    fields = tuple(
        RowField(field, {"matrix": matrix}, trigger=field if watched else None) for matrix, field in names.items()
    )
    return _weights(f"head_{name}", "head", description, "matrix", "layer", "head", fields=fields)


def _changes() -> Iterator[Measure]:
    whole = {"tensor_group": "all"}
    for name, description, more in (
        (
            "weight_change",
            "distance of a tensor group to the previous checkpoint's, relative to its norm, per 1000 steps",
            (RowField("weight_change_by_group"),),
        ),
        (
            "weight_change_from_first",
            "distance of a tensor group to the first checkpoint's, relative to its norm",
            (),
        ),
        (
            "weight_update_cosine",
            "cosine of a tensor group's change from the previous checkpoint with the change before",
            (),
        ),
    ):
        shown = RowField(name, whole, trigger=name if name == "weight_change" else None)
        yield _weights(name, "model", description, "tensor_group", fields=(shown, *more))


MEASURES: tuple[Measure, ...] = (
    _weights(
        "head_singular_values",
        "head",
        "singular values of a head's W_QK or W_OV, LayerNorm gain folded in, the largest first",
        *("matrix", "layer", "head", "singular_value"),
    ),
    _of_heads("effective_rank", "exp of the entropy of the normalised singular values", "effective_rank", watched=True),
    _of_heads("participation_ratio", "(sum of s^2)^2 / (sum of s^4) of singular values s", "participation_ratio"),
    _of_heads("matrix_norm", "Frobenius norm of W_QK or W_OV, LayerNorm gain folded in", "norm"),
    _of_heads(
        "direction_overlap",
        "share of the span of the 8 leading singular directions kept from the previous checkpoint",
        "direction_overlap",
    ),
    _of_heads(
        "direction_overlap_to_reference",
        "share of the span of the 8 leading singular directions shared with the reference checkpoint",
        "direction_overlap_to_reference",
    ),
    *(
        _weights(f"mlp_{name}", "mlp", f"Frobenius norm of the {which} kernel", "layer", fields=(RowField(name),))
        for name, which in (("fc_in_norm", "MLP's input"), ("fc_out_norm", "MLP's output"))
    ),
    *_changes(),
)
