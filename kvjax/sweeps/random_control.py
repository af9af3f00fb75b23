"""The spread of the random control over its directions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from kvjax.measure.declarations.components import DRAWS, DROP_SOURCES, SPREAD
from kvjax.measure.sequence_sums import Counting


def random_spreads(
    arrays: Mapping[str, np.ndarray], counting: Counting, members: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """Measures how far the drops under single random directions lie apart; nothing if the control was not measured.

    Args:
      arrays: measured sums; `draws/<component>/<quantity>` [C, directions, splits, L] or [C, directions, splits, L, H].
      counting, members: reads, and the sequences of all and of each split.

    Returns:
      By measure, the standard deviation over the directions (of a sample: n - 1), [C, splits, L] or [C, splits, L, H].
    """
    reads = np.array([counting.counts["reads"][own].sum() for own in members], np.float64)
    found = {}
    for component, (quantity, source) in itertools.product(("head", "mlp"), DROP_SOURCES.items()):
        if (name := f"{DRAWS}{component}/{source}") not in arrays:
            continue
        of_splits = np.moveaxis(arrays[name].astype(np.float64), 2, 0)  # [splits, C, directions, …]
        sums = np.concatenate([of_splits.sum(axis=0, keepdims=True), of_splits])
        counts = reads.reshape(-1, *[1] * (sums.ndim - 1))
        means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
        found[f"{component}_{quantity}_drop{SPREAD}"] = np.moveaxis(means.std(axis=2, ddof=1), 0, 1)
    return found
