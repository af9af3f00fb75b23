"""How every read's residual states move between checkpoints: a pass of its own over pairs of them.

The sweep keeps sums of states, enough for the drift of their mean. How single events move, and whether the geometry of
all of them stays, needs the states of two checkpoints at once: they are formed again, one forward pass each, in step
order, and what was found of a pair is kept like any other measurement.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.artifacts.results import CheckpointResult, ResultStore
from kvjax.measure.residual import event_drift, linear_cka
from kvjax.model.decoder import DecoderConfig, Params
from kvjax.model.sites import STAGE_SITES
from kvjax.sweeps.engine import run_clean
from kvjax.sweeps.fit import flatten_reads, probe_features
from kvjax.sweeps.stream import CheckpointSource, ProbeProgram
from kvjax.task.encoding import EncodedRecords

OTHERS = ("previous", "reference")

Named = tuple[str, CheckpointResult]


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
    states: dict[str, jax.Array] = {}
    # As they are on the host: on the devices the sweep's copy is spread for checkpoints side by side.
    buckets = tuple(bucket.batches for bucket in program.buckets)

    def states_of(name: str) -> jax.Array:
        if name not in states:
            step, path = files[name]
            states[name] = read_states(program.program.config, source.load(path, step).params, buckets)
        return states[name]

    num_splits, groups = program.program.num_splits, 2 * (2 * program.program.config.n_layers + 2)

    def between(name: str, result: CheckpointResult, kind: str, other: Named | None) -> Mapping[str, np.ndarray]:
        if other is None:
            return {"event_drift": np.full((num_splits, groups), np.nan), "cka": np.full(groups, np.nan)}
        key = hashlib.sha256(f"{result.info['sha256']} {other[1].info['sha256']}".encode()).hexdigest()
        stored = store.find(f"movement_{name}_{kind}", key)
        if stored is None:
            found = movement(states_of(name), states_of(other[0]), buckets, num_splits)
            arrays = {measure: np.asarray(x) for measure, x in found.items()}
            stored = store.save(f"movement_{name}_{kind}", key, result.step, arrays, {"other": other[0]})
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


@functools.partial(jax.jit, static_argnames="num_splits")
def movement(
    states_GxNxD: jax.Array, others_GxNxD: jax.Array, buckets: tuple[EncodedRecords, ...], num_splits: int
) -> dict[str, jax.Array]:
    """Returns how two checkpoints' states of the same reads differ.

    Returns:
      `event_drift` [splits, G]: 1 - cosine, summed over the reads of a split; `cka` [G]: linear CKA over all reads.
    """

    def of_reads(x: jax.Array) -> jax.Array:
        return jnp.concatenate([x(batch).reshape(-1) for batch in buckets])

    counted = of_reads(lambda batch: batch.is_read & (batch.weights > 0)[..., None])
    splits = of_reads(lambda batch: jnp.broadcast_to(batch.splits[..., None], batch.is_read.shape))
    in_split_ZxN = (splits[None] == jnp.arange(num_splits)[:, None]) & counted[None]
    drift_GxN = event_drift(states_GxNxD, others_GxNxD)
    return {
        "event_drift": jnp.sum(jnp.where(in_split_ZxN[:, None], drift_GxN[None], 0.0), axis=-1),
        "cka": linear_cka(states_GxNxD, others_GxNxD, counted),
    }
