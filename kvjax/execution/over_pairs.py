"""Runs a measurement of one checkpoint and one microbatch of pairs over all checkpoints and all pairs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from kvjax.devices import Placement
from kvjax.execution.over_checkpoints import checkpoints_of, over_chunks
from kvjax.execution.unbucket import unbucket
from kvjax.task.pair_encoding import EncodedPairs, bucket_by_last_affected, bucket_by_window


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairBatch:
    """A microbatch of pairs, as a measurement gets it.

    Attributes:
      pairs: B pairs.
      window: how many positions, from the first changed one on, a change can reach.
      donors_BxT: the token that each position's replacement comes from; None unless `OverPairs.run` was given them.
    """

    pairs: EncodedPairs
    window: int = dataclasses.field(metadata={"static": True})
    donors_BxT: jax.Array | None = None


class Measurement(Protocol):
    """A measurement of one checkpoint on one microbatch: arrays [B, …] by name.

    It is a frozen dataclass of what it depends on besides, so that an equal one is not compiled again.
    """

    def __call__(self, tree: Any, batch: PairBatch, *shared: Any) -> dict[str, jax.Array]: ...


class OverPairs:
    """Pairs in microbatches, and the loop of measurements over them.

    Args:
      encoded: the pairs.
      tokens_per_batch: about how many tokens a microbatch holds.
      devices: how many devices share the pairs.
      max_buckets: how many different sizes pairs are padded to; each is compiled.
      whole_streams: whether measurements compute streams from their first token on, not from the first changed one.

    Attributes:
      buckets: the pairs by window, or by length up to the last affected read, in microbatches.
    """

    def __init__(
        self,
        encoded: EncodedPairs,
        *,
        tokens_per_batch: int,
        devices: int = 1,
        max_buckets: int = 2,
        whole_streams: bool = False,
    ):
        bucket = bucket_by_last_affected if whole_streams else bucket_by_window
        self.buckets = bucket(encoded, tokens_per_batch=tokens_per_batch, max_buckets=max_buckets, devices=devices)
        self._num_pairs, self._devices = len(encoded), devices

    def run(
        self, measure: Measurement, stacked: Any, *shared: Any, donors: Sequence[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Measures every pair at every checkpoint.

        Args:
          measure: the measurement.
          stacked: parameters, or a tree that holds them, with a leading checkpoint axis C.
          *shared: whatever every checkpoint needs.
          donors: for each bucket, the donors of its microbatches, [microbatch, B, T].

        Returns:
          The arrays, [C, N, …], in the order of the pairs; NaN beyond the window of a pair's bucket.
        """
        # Devices share the pairs of one checkpoint: three checkpoints would leave one of two devices idle.
        placement = Placement(self._devices)

        def dispatch(trees: list[Any]) -> list[dict[str, jax.Array]]:
            (tree,) = trees
            return [
                _run_bucket(measure, bucket.window, placement, tree, bucket.batches, donors and donors[index], shared)
                for index, bucket in enumerate(self.buckets)
            ]

        chunks = over_chunks(dispatch, checkpoints_of(stacked), size=1, in_flight=0)
        collected = [unbucket(chunk.outputs, self.buckets, self._num_pairs) for chunk in chunks]
        return {name: np.concatenate([x[name] for x in collected]) for name in collected[0]}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run_bucket(
    measure: Measurement,
    window: int,
    placement: Placement,
    tree: Any,
    batches: EncodedPairs,
    donors: np.ndarray | None,
    shared: tuple[Any, ...],
) -> dict[str, jax.Array]:
    """Measures the microbatches of one bucket at one checkpoint, [1, microbatch, B, …]."""

    def of_part(part: tuple[EncodedPairs, Any], tree: Any, shared: Any) -> dict[str, jax.Array]:
        def of_batch(batch: tuple[EncodedPairs, Any]) -> dict[str, jax.Array]:
            pairs, donors_BxT = batch
            return measure(tree, PairBatch(pairs, window, donors_BxT), *shared)

        return jax.lax.map(of_batch, part)

    found = placement.on_each_device(of_part, (True, False, False))((batches, donors), tree, shared)
    return jax.tree.map(lambda x: x[None], found)
