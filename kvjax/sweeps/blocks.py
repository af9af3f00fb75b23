"""Cuts a run's checkpoints into blocks, so that the tables of a long run take the memory of one block.

A checkpoint's numbers depend on its own sums, and on those of the checkpoint before, the first and the reference. So a
block begins with the last checkpoint of the block before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import xarray as xr

from kvjax.sweeps.results import MeasuredRun

BLOCK = 128  # checkpoints: fewer cost time, for each block has its own; more cost memory

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Block:
    """Some consecutive checkpoints of a run, and what their tables are made from.

    Attributes:
      before: 1 if the first of them is the last of the block before, which is there for changes alone; else 0.
      steps: of the C checkpoints.
      arrays: measured sums [C, …] by name.
      weights, moved, logistic: see `MeasuredRun`, of each of these checkpoints.
    """

    before: int
    steps: Sequence[int]
    arrays: Arrays
    weights: Sequence[Arrays]
    moved: Sequence[Arrays] | None
    logistic: Sequence[Arrays | None]

    def own(self, dataset: xr.Dataset) -> xr.Dataset:
        """Drops the checkpoint of the block before from arrays made of the block."""
        return dataset.isel(step=slice(self.before, None))


def spans(count: int) -> list[tuple[int, int, int]]:
    """Lists where the blocks of so many checkpoints begin and end, and `before` of each, see `Block`."""
    return [(max(0, begin - 1), min(count, begin + BLOCK), min(1, begin)) for begin in range(0, count, BLOCK)]


def blocks(measured: MeasuredRun) -> Iterator[Block]:
    """Reads the sums and comparisons of a run's checkpoints, block by block.

    Raises:
      InputError: sums or comparisons were lost since they were measured.
    """
    logistic = _all_or_none(measured.logistic)
    last: Arrays | None = None
    for begin, end, before in spans(len(measured.checkpoints)):
        own = measured.checkpoints[begin:end]
        read = [last] if before else []
        for named in own[before:]:
            read.append({**measured.sums(named), "read/fixed_margin": measured.margins.of_checkpoint(named)})
        last = read[-1]
        yield Block(
            before,
            [result.step for _, result in own],
            {name: np.stack([of_one[name] for of_one in read]) for name in read[0]},
            [measured.weights(named) for named in own],
            measured.moved and [measured.moved(named) for named in own],
            logistic[begin:end],
        )


def _all_or_none(logistic: Sequence[Arrays | None]) -> Sequence[Arrays | None]:
    """Puts NaN in the place of checkpoints without logistic probes if any other has them: so all blocks have them."""
    fitted = next((of_one for of_one in logistic if of_one is not None), None)
    if fitted is None:
        return logistic
    missing = {name: np.full(x.shape, np.nan) for name, x in fitted.items()}
    return [missing if of_one is None else of_one for of_one in logistic]
