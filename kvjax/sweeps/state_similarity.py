"""How every read's residual states move between checkpoints, over pairs of them.

The sweep keeps sums of states, enough for the drift of their mean. How single events move, and whether the geometry of
all of them stays, needs the states of two checkpoints at once. While a sweep measures both, their states are on the
devices anyway (`kvjax.sweeps.movement_watch`); those of checkpoints measured before are formed again, one forward pass
each. What was found of a pair is kept like any other measurement.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.artifacts.checkpoint_sums import CheckpointResult, ResultStore
from kvjax.execution.fit_set import flatten_reads, probe_features
from kvjax.measure.residual import event_drift, linear_cka, spread
from kvjax.model.checkpoint import CheckpointSource
from kvjax.model.decoder import DecoderConfig, Params
from kvjax.model.restart import run_clean
from kvjax.model.sites import STAGE_SITES
from kvjax.model.transforms import Lift, over_interventions
from kvjax.sweeps.compiled_sweep import ProbeProgram
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


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Which checkpoint is compared with which: names, the first one's step, how the other relates, both files' hashes.

    Nothing of their states, so that it may wait until the devices are done.
    """

    name: str
    step: int
    kind: str
    other: str
    hashes: tuple[str, str]


def _pair_key(sha256: str, other_sha256: str) -> str:
    return hashlib.sha256(f"{sha256} {other_sha256}".encode()).hexdigest()


def keep_movement(store: ResultStore, of: Comparison, found: Mapping[str, jax.Array | np.ndarray]) -> CheckpointResult:
    """Keeps what `movement` found of two checkpoints."""
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
            states[name] = ReadStates(values, spread_of_states(values, buckets, lift=lift))
        return states[name]

    groups = 2 * (2 * program.program.config.n_layers + 2)

    def between(name: str, result: CheckpointResult, kind: str, other: Named | None) -> Mapping[str, np.ndarray]:
        if other is None:
            return {"event_drift": np.full((num_splits, groups), np.nan), "cka": np.full(groups, np.nan)}
        hashes = result.info["sha256"], other[1].info["sha256"]
        stored = store.find(f"movement_{name}_{kind}", _pair_key(*hashes))
        if stored is None:
            found = movement(states_of(name), states_of(other[0]), buckets, num_splits=num_splits, lift=lift)
            stored = keep_movement(store, Comparison(name, result.step, kind, other[0], hashes), found)
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
def spread_of_states(values_GxNxD: jax.Array, buckets: tuple[EncodedRecords, ...], *, lift: Lift) -> jax.Array:
    """Returns the spread of one checkpoint's states, [G], which all their comparisons need."""
    counted = _counted(buckets)
    return over_interventions(lambda x: spread(x[None], counted)[0], lift=lift)(values_GxNxD)


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
