"""Multinomial logistic probes at named checkpoints, beside the ridge probes that every checkpoint has.

They are fitted by iteration, so cost tens of times what ridge does; a pass of its own fits and scores them where asked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.artifacts.checkpoint_sums import CheckpointResult, ResultStore
from kvjax.execution.fit_set import PROBE_TARGETS, probe_labels
from kvjax.measure.probes import NO_LABEL, fit_logistic, label_wins, probe_scores, ridge_system, standardise
from kvjax.model.checkpoint import CheckpointSource
from kvjax.model.decoder import DecoderConfig, Params
from kvjax.sweeps.compiled_sweep import ProbeProgram
from kvjax.sweeps.state_similarity import read_states
from kvjax.task.encoding import EncodedRecords


def measure_logistic(
    results: Mapping[str, CheckpointResult],
    named: Callable[[str], bool],
    files: Mapping[str, tuple[int | None, Path]],
    program: ProbeProgram,
    store: ResultStore,
    source: CheckpointSource,
) -> dict[str, Mapping[str, np.ndarray]]:
    """Returns the logistic probes' right answers of checkpoints that are named, or were measured before.

    Args:
      results: result name -> measurement.
      named: whether a result's checkpoint is to be measured.
      files: result name -> (step or None, checkpoint file).
      program: the probe set, with its fit set.
      store: where what was found before is kept.
      source: where parameters come from.

    Returns:
      Result name -> `logistic/<target>` [splits, 2 S], right answers by split, stages at p_e first.
    """
    measured = {}
    for name, result in results.items():
        key = result.info["sha256"]
        stored = store.find(f"logistic_{name}", key)
        if stored is None and named(name):
            step, path = files[name]
            right = logistic_answers(
                program.program.config,
                program.program.key_ids,
                program.program.value_ids,
                program.program.num_splits,
                source.load(path, step).params,
                jax.device_get(program.data.fit),
                tuple(bucket.batches for bucket in program.buckets),
            )
            arrays = {f"logistic/{target}": np.asarray(x) for target, x in right.items()}
            stored = store.save(f"logistic_{name}", key, result.step, arrays, {})
        if stored is not None:
            measured[name] = stored.arrays
    return measured


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def logistic_answers(
    config: DecoderConfig,
    key_ids: tuple[int, ...],
    value_ids: tuple[int, ...],
    num_splits: int,
    params: Params,
    fit: EncodedRecords,
    buckets: tuple[EncodedRecords, ...],
) -> dict[str, jax.Array]:
    """Returns the right answers of one checkpoint's logistic probes: target -> [splits, 2 S]."""
    keys, values = np.array(key_ids), np.array(value_ids)
    fit_labels = probe_labels(fit, key_ids=keys, value_ids=values)
    by_bucket = [probe_labels(batches, key_ids=keys, value_ids=values) for batches in buckets]
    labels = {target: jnp.concatenate([x[target] for x in by_bucket]) for target in PROBE_TARGETS}
    splits = jnp.concatenate([jnp.repeat(x.splits.reshape(-1), x.is_read.shape[-1]) for x in buckets])
    in_split_NxZ = (splits[:, None] == jnp.arange(num_splits)[None]).astype(jnp.float32)
    # The same features, standardised in the same way, as the ridge probes have.
    counted = (fit_labels["query_key"] != NO_LABEL).astype(jnp.float32)
    system = ridge_system(read_states(config, params, (fit,)), counted)
    rows = standardise(system, read_states(config, params, buckets))

    def right(target: str, group: tuple[jax.Array, jax.Array]) -> jax.Array:
        features_NxD, rows_NxD = group
        num_classes = len(keys) if target == "query_key" else len(values)
        weights, intercepts = fit_logistic(features_NxD, fit_labels[target], num_classes)
        wins = label_wins(probe_scores(weights, intercepts, rows_NxD), labels[target])
        return jnp.matmul(wins.astype(jnp.float32), in_split_NxZ)

    return {
        target: jax.lax.map(functools.partial(right, target), (system.features, rows)).T for target in PROBE_TARGETS
    }
