"""Runs a measurement of one checkpoint and one microbatch of pairs over all checkpoints and all pairs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from kvjax.devices import Placement
from kvjax.execution.export_cache import LoweredFunction, compile_together, kept_lowered, traced_here
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
      several: how many roles of one pair have more than one position, at most.
    """

    pairs: EncodedPairs
    window: int = dataclasses.field(metadata={"static": True})
    several: int = dataclasses.field(metadata={"static": True})


class Measurement(Protocol):
    """A measurement of one checkpoint on one microbatch: arrays [B, …] by name.

    It is a frozen dataclass of what it depends on besides, so that an equal one is neither traced nor compiled again.
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
      most_pairs: how many pairs of a window a microbatch may hold, for measurements that compute more than its tokens.

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
        most_pairs: Callable[[int], int] | None = None,
    ):
        bucket = bucket_by_last_affected if whole_streams else bucket_by_window
        sizes = {"tokens_per_batch": tokens_per_batch, "max_buckets": max_buckets, "devices": devices}
        self.buckets = bucket(encoded, **sizes, most_pairs=most_pairs)
        self._num_pairs, self._devices = len(encoded), devices

    def run(self, measure: Measurement, stacked: Any, *shared: Any) -> dict[str, np.ndarray]:
        """Measures every pair at every checkpoint.

        Args:
          measure: the measurement.
          stacked: parameters, or a tree that holds them, with a leading checkpoint axis C.
          *shared: whatever every checkpoint needs.

        Returns:
          The arrays, [C, N, …], in the order of the pairs; NaN beyond the window of a pair's bucket.
        """
        # Devices share the pairs of one checkpoint: three checkpoints would leave one of two devices idle.
        placement = Placement(self._devices)
        measures = [_InWindow(measure, bucket.window, bucket.several) for bucket in self.buckets]
        # Once, for all checkpoints.
        batches = [jax.device_put(bucket.batches, placement.split) for bucket in self.buckets]
        shared = jax.device_put(shared, placement.whole)
        programs: list[LoweredFunction] = []

        def dispatch(trees: list[Any]) -> list[dict[str, jax.Array]]:
            tree = jax.device_put(trees[0], placement.whole)
            if not programs:
                keep = dataclasses.is_dataclass(measure)
                programs.extend(compiled_on_microbatches(measures, placement, tree, batches, *shared, keep=keep))
            return [program(tree, own, *shared) for program, own in zip(programs, batches, strict=True)]

        chunks = over_chunks(dispatch, checkpoints_of(stacked), size=1, in_flight=0)
        collected = [unbucket(chunk.outputs, self.buckets, self._num_pairs) for chunk in chunks]
        return {name: np.concatenate([x[name] for x in collected]) for name in collected[0]}


@dataclasses.dataclass(frozen=True)
class _InWindow:
    """A measurement on the pairs of one bucket, which share a window."""

    measure: Measurement
    window: int
    several: int

    def __call__(self, tree: Any, pairs: EncodedPairs, *shared: Any) -> dict[str, jax.Array]:
        return self.measure(tree, PairBatch(pairs, self.window, self.several), *shared)


def compiled_on_microbatches(
    measures: Sequence[Callable[..., dict[str, jax.Array]]],
    placement: Placement,
    tree: Any,
    batches: Sequence[Any],
    *shared: Any,
    keep: bool = True,
) -> list[LoweredFunction]:
    """Compiles measurements of one checkpoint on the microbatches of several buckets, side by side.

    Args:
      measures: for each bucket, of the tree, one microbatch and `shared`.
      placement: the devices that share the microbatches; they divide their number.
      tree: the checkpoint's parameters, or a tree that holds them, where `placement.whole` says.
      batches: for each bucket, a tree of arrays [microbatch, B, …], where `placement.split` says.
      *shared: whatever every microbatch needs, where `placement.whole` says.
      keep: whether later processes find the lowered programs; then the `repr` of each measurement says all of it.

    Returns:
      For each bucket, a function of a tree, microbatches and `shared`, of arrays [1, microbatch, B, …].
    """

    def calls() -> Iterator[tuple[LoweredFunction, tuple[Any, ...]]]:
        for measure, own in zip(measures, batches, strict=True):
            args, of = (tree, own, *shared), _OnDevices(measure, placement)
            yield kept_lowered(_over_microbatches, of, *args) if keep else traced_here(_over_microbatches, of), args

    return compile_together(calls())


@dataclasses.dataclass(frozen=True)
class _OnDevices:
    """A measurement of microbatches that devices share."""

    measure: Callable[..., dict[str, jax.Array]]
    placement: Placement


@functools.partial(jax.jit, static_argnums=0)
def _over_microbatches(of: _OnDevices, tree: Any, batches: Any, *shared: Any) -> dict[str, jax.Array]:
    def of_part(part: Any, tree: Any, shared: Any) -> dict[str, jax.Array]:
        return jax.lax.map(lambda batch: of.measure(tree, batch, *shared), part)

    found = of.placement.on_each_device(of_part, (True, False, False))(batches, tree, shared)
    return jax.tree.map(lambda x: x[None], found)
