"""Measures of a checkpoint's weights: computed on the host beside the devices' work, then labelled for the tables.

The devices' programs hold none of it. Singular values need LAPACK, which blocks in programs on several CPU devices, and
the host takes a few milliseconds for a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kvjax.measure.weight_changes import digest, squared_norms, update_cosine
from kvjax.measure.weight_spectra import HeadSpectra, effective_rank, head_spectra, participation_ratio
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params
from kvjax.model.weights import HEAD_MATRICES, mlp_input_kernels, mlp_output_kernels, tensor_groups

Arrays = Mapping[str, np.ndarray]

ALL_GROUPS = "all"  # every tensor of the model, beside its groups

# What is stored of each checkpoint.
WEIGHT_ARRAYS = frozenset(
    {"weights/singular_values", "weights/fc_in_norm", "weights/fc_out_norm", "weights/squared_norm", "weights/digest"}
)


def measure_weights(params: Params, config: DecoderConfig) -> tuple[dict[str, np.ndarray], HeadSpectra]:
    """Measures the weights of one checkpoint.

    Returns:
      `WEIGHT_ARRAYS`: `singular_values` [matrices, L, H, E]; `fc_in_norm`, `fc_out_norm` [L], Frobenius norms of the
      kernels; `squared_norm` [groups] of each tensor group; `digest` [32] of all parameters.
      The spectra, whose directions are compared with other checkpoints' and not stored.
    """
    spectra = head_spectra(params, config.n_heads)
    arrays = {
        "weights/singular_values": spectra.values,
        "weights/fc_in_norm": _norms(mlp_input_kernels(params)),
        "weights/fc_out_norm": _norms(mlp_output_kernels(params)),
        "weights/squared_norm": squared_norms(params, config.n_layers),
        "weights/digest": digest(params),
    }
    return arrays, spectra


def weight_labels(arrays: Arrays) -> dict[str, Sequence[str | int]]:
    """Labels the axes that only measures of weights have."""
    _, _, n_layers, _, width = arrays["weights/singular_values"].shape
    return {
        "matrix": list(HEAD_MATRICES),
        "singular_value": list(range(width)),
        "tensor_group": [ALL_GROUPS, *tensor_groups(n_layers)],
    }


def weight_statistics(
    arrays: Arrays, compared: Sequence[Arrays], steps: Sequence[int], *, first: Arrays | None = None
) -> dict[str, np.ndarray]:
    """Forms every declared measure of weights, [C, …] each.

    Args:
      arrays: `WEIGHT_ARRAYS` of C checkpoints, [C, …].
      compared: of each, how its weights differ from other checkpoints', see `WeightComparisons`.
      steps: the training steps, ascending.
      first: `WEIGHT_ARRAYS` of the run's first checkpoint; None if it is the first of these.
    """
    values = arrays["weights/singular_values"]
    norms_CxG = arrays["weights/squared_norm"]

    def gathered(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.stack([found.get(name, np.full(shape, np.nan)) for found in compared])

    distances = {
        kind: gathered(f"distance/{kind}", norms_CxG.shape[1:]) for kind in ("previous", "before_previous", "first")
    }
    to_previous, to_before, to_first = (_with_all(x) for x in distances.values())
    norms = _with_all(norms_CxG)
    first_norms = norms[:1] if first is None else _with_all(first["weights/squared_norm"][None])
    thousands_C = np.diff(np.asarray(steps, np.float64), prepend=np.nan) / 1000
    return {
        "head_singular_values": values,
        "head_effective_rank": effective_rank(values),
        "head_participation_ratio": participation_ratio(values),
        "head_matrix_norm": np.linalg.norm(values, axis=-1),
        "head_direction_overlap": gathered("overlap/previous", values.shape[1:-1]),
        "head_direction_overlap_to_reference": gathered("overlap/reference", values.shape[1:-1]),
        "mlp_fc_in_norm": arrays["weights/fc_in_norm"],
        "mlp_fc_out_norm": arrays["weights/fc_out_norm"],
        "weight_change": _relative(to_previous, _before(norms)) / thousands_C[:, None],
        "weight_change_from_first": _relative(to_first, first_norms),
        "weight_update_cosine": update_cosine(to_previous, _before(to_previous), to_before),
    }


def _norms(kernels_LxNxM: np.ndarray) -> np.ndarray:
    return np.linalg.norm(np.asarray(kernels_LxNxM, np.float64), axis=(1, 2))


def _with_all(squares_CxG: np.ndarray) -> np.ndarray:
    """Puts the sum over the groups that exist before those of the groups; NaN if none does."""
    some = np.isfinite(squares_CxG).any(axis=1)
    total_C = np.where(some, np.nansum(squares_CxG, axis=1), np.nan)
    return np.concatenate([total_C[:, None], squares_CxG], axis=1)


def _before(x_CxG: np.ndarray) -> np.ndarray:
    """Shifts checkpoints by one: each gets the previous one's values, the first NaN."""
    return np.concatenate([np.full((1, *x_CxG.shape[1:]), np.nan), x_CxG[:-1]])


def _relative(squared_distances: np.ndarray, squared_norms: np.ndarray) -> np.ndarray:
    """Divides distances by norms; NaN if a norm is 0."""
    ratio = np.full(squared_distances.shape, np.nan)
    norms = np.broadcast_to(squared_norms, ratio.shape)
    return np.sqrt(np.divide(squared_distances, norms, out=ratio, where=norms > 0))
