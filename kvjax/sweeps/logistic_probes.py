"""Fits multinomial logistic probes at named checkpoints, beside the ridge probes that every checkpoint has.

They are fitted by iteration and so cost tens of times what ridge does: a pass of its own, only if asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.artifacts.checkpoint_sums import CheckpointResult, ResultStore
from kvjax.errors import unusable
from kvjax.execution.fit_set import probe_labels
from kvjax.execution.states_at_reads import form_states
from kvjax.measure.declarations.residual import PROBE_TARGETS
from kvjax.measure.probes import NO_LABEL, fit_logistic, label_wins, probe_scores, ridge_system, standardise
from kvjax.model.checkpoint import CheckpointSource
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params
from kvjax.sweeps.compiled_sweep import CompiledSweep
from kvjax.task.encoding import EncodedRecords


def measure_logistic(
    tabled: Sequence[tuple[str, CheckpointResult]],
    asked: Collection[str],
    *,
    files: Mapping[str, tuple[int | None, Path]],
    sweep: CompiledSweep,
    store: ResultStore,
    source: CheckpointSource,
    anew: bool = False,
) -> list[Mapping[str, np.ndarray] | None]:
    """Fits and scores logistic probes at the checkpoints asked for.

    Args:
      tabled: name and result of the run's checkpoints.
      asked: names of the checkpoints to measure, unless they were measured before.
      files: result name -> (step or None, checkpoint file).
      sweep: the probe set, with its fit set.
      store: where results are kept.
      source: where parameters come from.
      anew: whether to measure those asked for even if they were measured before.

    Returns:
      For each checkpoint, `logistic/<target>` [splits, 2 S], right answers by split, stages at p_e first; None if it
      was never measured.
    """
    measured: list[Mapping[str, np.ndarray] | None] = []
    for name, result in tabled:
        key = result.info["sha256"]
        stored = None if anew and name in asked else store.find(f"logistic_{name}", key)
        if stored is None and name in asked:
            step, path = files[name]
            checkpoint = source.load(path, step)
            if checkpoint.sha256 != key:
                raise unusable(path, "a file that stays as it is", "that it changed during the sweep")
            right = logistic_answers(
                sweep.spec.config,
                sweep.spec.key_ids,
                sweep.spec.value_ids,
                sweep.spec.num_splits,
                checkpoint.params,
                jax.device_get(sweep.data.fit),
                tuple(bucket.batches for bucket in sweep.buckets),
            )
            arrays = {f"logistic/{target}": np.asarray(x) for target, x in right.items()}
            stored = store.save(f"logistic_{name}", key, result.step, arrays, {})
        measured.append(stored and stored.arrays)
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
    """Fits one checkpoint's logistic probes and counts their right answers: target -> [splits, 2 S]."""
    keys, values = np.array(key_ids), np.array(value_ids)
    fit_labels = probe_labels(fit, key_ids=keys, value_ids=values)
    by_bucket = [probe_labels(batches, key_ids=keys, value_ids=values) for batches in buckets]
    labels = {target: jnp.concatenate([x[target] for x in by_bucket]) for target in PROBE_TARGETS}
    splits = jnp.concatenate([jnp.repeat(x.splits.reshape(-1), x.is_read.shape[-1]) for x in buckets])
    in_split_NxZ = (splits[:, None] == jnp.arange(num_splits)[None]).astype(jnp.float32)
    # The same features, standardised in the same way, as the ridge probes have.
    counted = (fit_labels["query_key"] != NO_LABEL).astype(jnp.float32)
    system = ridge_system(form_states(config, params, (fit,)), counted)
    rows = standardise(system, form_states(config, params, buckets))

    def right(target: str, group: tuple[jax.Array, jax.Array]) -> jax.Array:
        features_NxD, rows_NxD = group
        num_classes = len(keys) if target == "query_key" else len(values)
        weights, intercepts = fit_logistic(features_NxD, fit_labels[target], num_classes)
        wins = label_wins(probe_scores(weights, intercepts, rows_NxD), labels[target])
        return jnp.matmul(wins.astype(jnp.float32), in_split_NxZ)

    return {
        target: jax.lax.map(functools.partial(right, target), (system.features, rows)).T for target in PROBE_TARGETS
    }
