"""How every read's residual states move between checkpoints, over pairs of them.

The sweep keeps sums of states, enough for the drift of their mean. How single events move, and whether the geometry of
all of them stays, needs the states of two checkpoints at once. While a sweep measures both, their states are on the
devices anyway (`MovementWatch`); those of checkpoints measured before are formed again, one forward pass each. What was
found of a pair is kept like any other measurement.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kvjax.artifacts.results import CheckpointResult, ResultStore
from kvjax.measure.residual import event_drift, linear_cka, spread
from kvjax.model.decoder import DecoderConfig, Params
from kvjax.model.sites import STAGE_SITES
from kvjax.model.transforms import CHECKPOINT_AXIS, Lift, checkpoint_mesh, over_checkpoints, over_interventions
from kvjax.sweeps.engine import run_clean
from kvjax.sweeps.fit import flatten_reads, probe_features
from kvjax.sweeps.probe_program import ProbeProgram
from kvjax.sweeps.program import Program
from kvjax.sweeps.stream import CheckpointSource, LoadedCheckpoint
from kvjax.task.encoding import EncodedRecords

OTHERS = ("previous", "reference")

Named = tuple[str, CheckpointResult]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReadStates:
    """One checkpoint's states at the reads.

    Attributes:
      values: [G, N, D], G = 2 S: every stage at p_e, then at s_e.
      spread: [G], see `kvjax.measure.residual.spread`.
    """

    values: jax.Array
    spread: jax.Array


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
        self._at_hand: dict[str, tuple[LoadedCheckpoint, ReadStates]] = {}

    def __call__(self, chunk: Sequence[tuple[str, LoadedCheckpoint]], states: jax.Array) -> Callable[[], None]:
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
                    _keep(self._store, comparison, arrays)

        return keep

    def _pair(self, name: str, kind: str, other: str) -> tuple[_Comparison, ReadStates, ReadStates]:
        """Returns a comparison and the states of the two checkpoints."""
        checkpoint, own = self._at_hand[name]
        other_checkpoint, others = self._at_hand[other]
        hashes = checkpoint.sha256, other_checkpoint.sha256
        return _Comparison(name, checkpoint.step, kind, other, hashes), own, others

    def _start(
        self, pairs: Sequence[tuple[_Comparison, ReadStates, ReadStates]], of_chunk: Sequence[ReadStates]
    ) -> Iterator[tuple[dict[str, jax.Array], dict[int, _Comparison]]]:
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


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """Which checkpoint is compared with which: names, the first one's step, how the other relates, both files' hashes.

    Nothing of their states, so that it may wait until the devices are done.
    """

    name: str
    step: int
    kind: str
    other: str
    hashes: tuple[str, str]


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


def _pair_key(sha256: str, other_sha256: str) -> str:
    return hashlib.sha256(f"{sha256} {other_sha256}".encode()).hexdigest()


def _keep(store: ResultStore, of: _Comparison, found: Mapping[str, jax.Array | np.ndarray]) -> CheckpointResult:
    arrays = {measure: np.asarray(x) for measure, x in found.items()}
    return store.save(f"movement_{of.name}_{of.kind}", _pair_key(*of.hashes), of.step, arrays, {"other": of.other})


def measure_movement(
    results: Sequence[Named],
    reference: Named | None,
    files: Mapping[str, tuple[int | None, Path]],
    program: ProbeProgram,
    store: ResultStore,
    source: CheckpointSource,
) -> list[dict[str, np.ndarray]]:
    """Returns, for each checkpoint, how its states differ from the previous one's and from the reference's.

    Args:
      results: name and measurement of a run's checkpoints, in step order.
      reference: those of the reference checkpoint; None where there is none.
      files: result name -> (step or None, checkpoint file).
      program: the probe set.
      store: where what was found before is kept.
      source: where parameters come from.

    Returns:
      For each checkpoint and each of `OTHERS`: `event_drift/<other>` [splits, 2 S], 1 - cosine summed over reads, and
      `cka/<other>` [2 S]; NaN for the first checkpoint's previous, and where there is no reference.
    """
    states: dict[str, ReadStates] = {}
    # As they are on the host: on the devices the sweep's copy is spread for checkpoints side by side.
    buckets = tuple(bucket.batches for bucket in program.buckets)

    num_splits, lift = program.program.num_splits, program.program.interventions

    def states_of(name: str) -> ReadStates:
        if name not in states:
            step, path = files[name]
            values = read_states(program.program.config, source.load(path, step).params, buckets)
            states[name] = with_spread(values, buckets, lift=lift)
        return states[name]

    groups = 2 * (2 * program.program.config.n_layers + 2)

    def between(name: str, result: CheckpointResult, kind: str, other: Named | None) -> Mapping[str, np.ndarray]:
        if other is None:
            return {"event_drift": np.full((num_splits, groups), np.nan), "cka": np.full(groups, np.nan)}
        hashes = result.info["sha256"], other[1].info["sha256"]
        stored = store.find(f"movement_{name}_{kind}", _pair_key(*hashes))
        if stored is None:
            found = movement(states_of(name), states_of(other[0]), buckets, num_splits=num_splits, lift=lift)
            stored = _keep(store, _Comparison(name, result.step, kind, other[0], hashes), found)
        return stored.arrays

    moved = []
    previous: Named | None = None
    for name, result in results:
        arrays = {}
        for kind, other in zip(OTHERS, (previous, reference), strict=True):
            arrays |= {f"{measure}/{kind}": x for measure, x in between(name, result, kind, other).items()}
        moved.append(arrays)
        previous = (name, result)
        keep = {name, reference[0] if reference else name}
        states = {kept: x for kept, x in states.items() if kept in keep}
    return moved


@functools.partial(jax.jit, static_argnums=0)
def read_states(config: DecoderConfig, params: Params, buckets: tuple[EncodedRecords, ...]) -> jax.Array:
    """Returns every stage's states at p_e and s_e of all reads, bucket after bucket: [2 S, reads, D]."""

    config = dataclasses.replace(config, tied="unembedding" not in params)  # as the checkpoint has it

    def of_batch(batch: EncodedRecords) -> jax.Array:
        _, clean = run_clean(params, config, batch.tokens, STAGE_SITES)
        return probe_features(clean.trace, batch)

    return jnp.concatenate([flatten_reads(jax.lax.map(of_batch, batches)) for batches in buckets], axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _spread_of_checkpoints(
    program: Program, states_CxGxNxD: jax.Array, buckets: tuple[EncodedRecords, ...]
) -> jax.Array:
    """Returns the spread [C, G] of the states of the checkpoints that devices share."""

    def of_checkpoint(values_GxNxD: jax.Array, buckets: tuple[EncodedRecords, ...]) -> jax.Array:
        return with_spread(values_GxNxD, buckets, lift=program.interventions).spread

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


@functools.partial(jax.jit, static_argnames="lift")
def with_spread(values_GxNxD: jax.Array, buckets: tuple[EncodedRecords, ...], *, lift: Lift) -> ReadStates:
    """Returns states with their spread, which all their comparisons need."""
    counted = _counted(buckets)
    return ReadStates(values_GxNxD, over_interventions(lambda x: spread(x[None], counted)[0], lift=lift)(values_GxNxD))


@functools.partial(jax.jit, static_argnames=("num_splits", "lift"))
def movement(
    states: ReadStates, others: ReadStates, buckets: tuple[EncodedRecords, ...], *, num_splits: int, lift: Lift
) -> dict[str, jax.Array]:
    """Returns how two checkpoints' states of the same reads differ.

    Args:
      states, others: of the two.
      buckets: the reads.
      num_splits: Z.
      lift: how stages are run; on a CPU one after another, which stay in cache.

    Returns:
      `event_drift` [Z, G]: 1 - cosine, summed over the reads of a split; `cka` [G]: linear CKA over all reads.
    """
    counted = _counted(buckets)
    splits = _of_reads(buckets, lambda batch: jnp.broadcast_to(batch.splits[..., None], batch.is_read.shape))
    in_split_ZxN = (splits[None] == jnp.arange(num_splits)[:, None]) & counted[None]

    def of_group(pair: tuple[ReadStates, ReadStates]) -> tuple[jax.Array, jax.Array]:
        (a, b) = jax.tree.map(lambda x: x[None], pair)
        drift_1xN = event_drift(a.values, b.values)
        by_split = jnp.sum(jnp.where(in_split_ZxN, drift_1xN, 0.0), axis=-1)
        return by_split, linear_cka(a.values, b.values, counted, (a.spread, b.spread))[0]

    drift_GxZ, cka_G = over_interventions(of_group, lift=lift)((states, others))
    return {"event_drift": drift_GxZ.T, "cka": cka_G}


def _counted(buckets: tuple[EncodedRecords, ...]) -> jax.Array:
    """Returns which rows are reads of a record, and no filling, bool [reads]."""
    return _of_reads(buckets, lambda batch: batch.is_read & (batch.weights > 0)[..., None])


def _of_reads(buckets: tuple[EncodedRecords, ...], of: Callable[[EncodedRecords], jax.Array]) -> jax.Array:
    return jnp.concatenate([of(batch).reshape(-1) for batch in buckets])
