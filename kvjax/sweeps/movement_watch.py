"""How states move between checkpoints, measured while a sweep has them on the devices."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec

from kvjax.artifacts.checkpoint_sums import ResultStore
from kvjax.model.checkpoint import Checkpoint
from kvjax.model.transforms import CHECKPOINT_AXIS, checkpoint_mesh, over_checkpoints
from kvjax.sweeps.compiled_sweep import ProbeProgram
from kvjax.sweeps.measure_checkpoint import Program
from kvjax.sweeps.state_similarity import OTHERS, Comparison, ReadStates, keep_movement, movement, spread_of_states
from kvjax.task.encoding import EncodedRecords


class MovementWatch:
    """Measures movement while a sweep measures the checkpoints, and keeps what it finds.

    Args:
      order: result names of the checkpoints that rows are wanted of, in step order.
      reference: that of the reference checkpoint, None where there is none.
      program: the probe set.
      store: where what was found is kept.
    """

    def __init__(self, order: Sequence[str], reference: str | None, program: ProbeProgram, store: ResultStore):
        self._others = {name: dict.fromkeys(OTHERS, reference) | {"previous": None} for name in order}
        for before, name in itertools.pairwise(order):
            self._others[name]["previous"] = before
        self._reference, self._store = reference, store
        self._program, self._buckets = program.program, program.data.buckets
        self._at_hand: dict[str, tuple[Checkpoint, ReadStates]] = {}

    def __call__(self, chunk: Sequence[tuple[str, Checkpoint]], states: jax.Array) -> Callable[[], None]:
        """Starts what the states of a chunk make possible, behind the chunk's own work; returns how to keep it.

        Args:
          chunk: names and checkpoints that the devices are measuring.
          states: [C, 2 S, reads, D] as the program returns them, shared by the devices.
        """
        of_chunk = _by_checkpoint(states, _spread_of_checkpoints(self._program, states, self._buckets))
        # The states of a shorter chunk's filling are left out.
        arrived = {name: (checkpoint, own) for (name, checkpoint), own in zip(chunk, of_chunk, strict=False)}
        self._at_hand |= arrived
        pairs = [
            self._pair(name, kind, other)
            for name in self._at_hand
            for kind, other in self._others.get(name, {}).items()
            if other in self._at_hand and (name in arrived or other in arrived)
        ]
        started = list(self._start(pairs, of_chunk))
        # The next chunk's first follows this chunk's last.
        self._at_hand = {name: self._at_hand[name] for name in (self._reference, chunk[-1][0]) if name in self._at_hand}

        def keep() -> None:
            for found, comparisons in started:
                by_device = jax.device_get(found)
                for index, comparison in comparisons.items():
                    arrays = {measure: x[index] for measure, x in by_device.items()}
                    keep_movement(self._store, comparison, arrays)

        return keep

    def _pair(self, name: str, kind: str, other: str) -> tuple[Comparison, ReadStates, ReadStates]:
        """Returns a comparison and the states of the two checkpoints."""
        checkpoint, own = self._at_hand[name]
        other_checkpoint, others = self._at_hand[other]
        hashes = checkpoint.sha256, other_checkpoint.sha256
        return Comparison(name, checkpoint.step, kind, other, hashes), own, others

    def _start(
        self, pairs: Sequence[tuple[Comparison, ReadStates, ReadStates]], of_chunk: Sequence[ReadStates]
    ) -> Iterator[tuple[dict[str, jax.Array], dict[int, Comparison]]]:
        """Yields what all devices compare at the same time, and which comparison each device's is, where it has one.

        One program for all devices: a program for one would be compiled for each.
        """
        idle = {_device(own): (own, own) for own in of_chunk}  # what a device compares that has no pair left
        waiting = {device: [pair for pair in pairs if _device(pair[1]) == device] for device in idle}
        for at_once in itertools.zip_longest(*waiting.values()):
            compared = [pair[1:] if pair else idle[device] for device, pair in zip(idle, at_once, strict=True)]
            own = _shared([own for own, _ in compared])
            others = _shared([jax.device_put(x, device) for device, (_, x) in zip(idle, compared, strict=True)])
            found = _movement_of_pairs(self._program, (own, others), self._buckets)
            yield found, {index: pair[0] for index, pair in enumerate(at_once) if pair}


def _device(states: ReadStates) -> jax.Device:
    return next(iter(states.spread.devices()))


def _by_checkpoint(states_CxGxNxD: jax.Array, spread_CxG: jax.Array) -> list[ReadStates]:
    """Returns each checkpoint's states, [1, …], on the device that they were made on."""

    def parts(x: jax.Array) -> list[jax.Array]:
        shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        whole = [shard.data for shard in shards]
        # A slice is a program, compiled for each device; the whole of a shard is none.
        return [part if len(part) == 1 else part[i : i + 1] for part in whole for i in range(len(part))]

    return list(map(ReadStates, parts(states_CxGxNxD), parts(spread_CxG)))


def _shared(of_devices: Sequence[ReadStates]) -> ReadStates:
    """Returns one checkpoint's states on each device, [1, …], as one array shared by them, without moving any."""
    sharding = NamedSharding(checkpoint_mesh(len(of_devices)), PartitionSpec(CHECKPOINT_AXIS))

    def joined(*parts: jax.Array) -> jax.Array:
        return jax.make_array_from_single_device_arrays((len(parts), *parts[0].shape[1:]), sharding, list(parts))

    return jax.tree.map(joined, *of_devices)


@functools.partial(jax.jit, static_argnums=0)
def _spread_of_checkpoints(
    program: Program, states_CxGxNxD: jax.Array, buckets: tuple[EncodedRecords, ...]
) -> jax.Array:
    """Returns the spread [C, G] of the states of the checkpoints that devices share."""

    of_checkpoint = functools.partial(spread_of_states, lift=program.interventions)
    lifted = over_checkpoints(of_checkpoint, lift=program.checkpoints, devices=program.devices)
    return lifted(states_CxGxNxD, buckets)


@functools.partial(jax.jit, static_argnums=0)
def _movement_of_pairs(
    program: Program, pairs: tuple[ReadStates, ReadStates], buckets: tuple[EncodedRecords, ...]
) -> dict[str, jax.Array]:
    """Returns what `movement` says of each device's pair, [devices, …]."""

    def of_pair(pair: tuple[ReadStates, ReadStates], buckets: tuple[EncodedRecords, ...]) -> dict[str, jax.Array]:
        return movement(*pair, buckets, num_splits=program.num_splits, lift=program.interventions)

    return over_checkpoints(of_pair, lift=program.checkpoints, devices=program.devices)(pairs, buckets)
