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

from kvjax.artifacts.results import CheckpointResult, ResultStore
from kvjax.measure.residual import event_drift, linear_cka, spread
from kvjax.model.decoder import DecoderConfig, Params
from kvjax.model.sites import STAGE_SITES
from kvjax.model.transforms import Lift, over_interventions
from kvjax.sweeps.engine import run_clean
from kvjax.sweeps.fit import flatten_reads, probe_features
from kvjax.sweeps.stream import CheckpointSource, LoadedCheckpoint, ProbeProgram
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
        self._buckets = tuple(bucket.batches for bucket in program.buckets)
        self._static = {"num_splits": program.program.num_splits, "lift": program.program.interventions}
        self._at_hand: dict[str, tuple[LoadedCheckpoint, ReadStates]] = {}

    def __call__(self, chunk: Sequence[tuple[str, LoadedCheckpoint]], states: jax.Array) -> Callable[[], None]:
        """Starts what the states of a chunk make possible, behind the chunk's own work; returns how to keep it.

        Args:
          chunk: names and checkpoints that the devices are measuring.
          states: [C, 2 S, reads, D] as the program returns them, shared by the devices.
        """
        arrived = {}
        # The states of a shorter chunk's filling are left out.
        for (name, checkpoint), values in zip(chunk, _by_checkpoint(states), strict=False):
            arrived[name] = checkpoint, with_spread(values, self._buckets, lift=self._static["lift"])
        self._at_hand |= arrived
        started = []
        for name, (checkpoint, own) in self._at_hand.items():
            for kind, other in self._others.get(name, {}).items():
                if other in self._at_hand and (name in arrived or other in arrived):
                    other_checkpoint, others = self._at_hand[other]
                    there = jax.device_put(others, next(iter(own.spread.devices())))
                    found = movement(own, there, self._buckets, **self._static)
                    started.append((name, kind, checkpoint, other, other_checkpoint.sha256, found))
        # The next chunk's first follows this chunk's last.
        self._at_hand = {name: self._at_hand[name] for name in (self._reference, chunk[-1][0]) if name in self._at_hand}

        def keep() -> None:
            for name, kind, checkpoint, other, other_sha256, found in started:
                _keep(self._store, name, kind, (checkpoint.sha256, other_sha256), checkpoint.step, found, other)

        return keep


def _by_checkpoint(states_CxGxNxD: jax.Array) -> Iterator[jax.Array]:
    """Yields each checkpoint's states, on the device that they were made on."""
    shards = sorted(states_CxGxNxD.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return (x for shard in shards for x in shard.data)


def _pair_key(sha256: str, other_sha256: str) -> str:
    return hashlib.sha256(f"{sha256} {other_sha256}".encode()).hexdigest()


def _keep(
    store: ResultStore,
    name: str,
    kind: str,
    hashes: tuple[str, str],
    step: int,
    found: Mapping[str, jax.Array],
    other: str,
) -> CheckpointResult:
    arrays = {measure: np.asarray(x) for measure, x in found.items()}
    return store.save(f"movement_{name}_{kind}", _pair_key(*hashes), step, arrays, {"other": other})


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
            stored = _keep(store, name, kind, hashes, result.step, found, other[0])
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
