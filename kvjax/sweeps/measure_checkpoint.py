"""Measures one checkpoint on the device: everything a sweep keeps of it, as sums; lifted over checkpoints.

For one checkpoint: the fit set's pass (component means, probes), the clean pass over the probe set, which keeps what
restarts need, and every ablation restarted from it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.devices import ONE_DEVICE, Lift, Placement
from kvjax.execution.fit_set import component_means, fit_all_probes, probe_labels
from kvjax.execution.states_at_reads import flatten_reads, spread_of_states
from kvjax.measure import registry
from kvjax.measure.declarations.residual import PROBE_TARGETS
from kvjax.measure.probes import RidgeProbes, RidgeSystem, label_wins, probe_scores, ranks_above, standardise
from kvjax.measure.weight_spectra import HeadSpectra
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.head_writes import HeadWrites
from kvjax.model.params import Params, stack_params
from kvjax.model.restart import CleanRun
from kvjax.model.sites import Trace
from kvjax.model.transforms import over_checkpoints
from kvjax.model.weights import HEAD_MATRICES
from kvjax.sweeps.ablations import measure_ablations, replacement_rows
from kvjax.sweeps.clean import Sums, measure_clean
from kvjax.task.encoding import EncodedRecords

# Sums by bucket, sums over the whole probe set, and the fields of `ReadStates` (exported programs return tuples alone).
Measured = tuple[list[Sums], Sums, tuple[jax.Array, jax.Array] | None]


@dataclasses.dataclass(frozen=True)
class SweepSpec:
    """The static settings that a sweep is compiled for; hashable.

    Attributes:
      config: the model's shape.
      value_ids, key_ids: token ids of values and keys.
      num_splits: number of splits the records are in.
      horizons: for each bucket, the positions an intervened run computes; later ones affect no read.
      ablations: kinds of ablation to measure; with none, the clean run alone.
      probes: whether trained linear probes are fitted and scored.
      states: whether the states at the reads are returned.
      value_logits: whether the logits of all values at the reads are returned.
      interventions: how the heads of one layer are run, `map` (one by one) or `vmap`.
      placement: which devices share the checkpoints, and how each runs its part.
      measures: names of the declared measures that the clean pass computes.
    """

    config: DecoderConfig
    value_ids: tuple[int, ...]
    key_ids: tuple[int, ...]
    num_splits: int
    horizons: tuple[int, ...]
    ablations: tuple[str, ...] = ()
    probes: bool = False
    states: bool = False
    value_logits: bool = False
    interventions: Lift = "map"
    placement: Placement = ONE_DEVICE
    measures: tuple[str, ...] = dataclasses.field(default_factory=registry.computed_names)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SweepData:
    """The records that every checkpoint is measured on.

    Attributes:
      buckets: microbatches [microbatch, B, …] of the probe set, one entry per length bucket.
      rows_of_splits: [Z, M] which rows of the states at the reads are each split's, see `rows_of_splits`.
      donors: for each bucket, the tokens that each is resampled from, [microbatch, draws, B, T]; empty without
        resample ablation. See `donors_by_bucket`.
      fit: microbatches of the fit set; None if neither means nor probes are needed.
      permutations: [P, fit rows] orders of the fit reads that probe labels are taken in, the identity first; None
        without probes.
    """

    buckets: tuple[EncodedRecords, ...]
    rows_of_splits: jax.Array
    donors: tuple[jax.Array, ...] = ()
    fit: EncodedRecords | None = None
    permutations: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SweptModel:
    """A checkpoint's weights as a sweep measures them; with a leading axis C on every array, those of several.

    Attributes:
      params: the parameters.
      key_directions: [L, H, D, R] the leading right singular directions of every head's W_QK. The host finds them, for
        singular vectors need LAPACK.
    """

    params: Params
    key_directions: jax.Array

    @classmethod
    def stack(cls, params: Sequence[Params], spectra: Sequence[HeadSpectra]) -> SweptModel:
        """Stacks several checkpoints, with the spectra of each."""
        directions = [of_checkpoint.right[HEAD_MATRICES.index("qk")] for of_checkpoint in spectra]
        return cls(stack_params(params), np.stack(directions).astype(np.float32))


@functools.partial(jax.jit, static_argnums=0)
def measure_checkpoints(spec: SweepSpec, stacked: SweptModel, data: SweepData) -> Measured:
    """Measures stacked checkpoints.

    Args:
      spec: the static settings.
      stacked: weights with a leading checkpoint axis C, a multiple of the devices that share it.
      data: the records.

    Returns:
      See `measure_checkpoint`, with a leading axis C on every array.
    """
    return over_checkpoints(functools.partial(measure_checkpoint, spec), spec.placement)(stacked, data)


def measure_checkpoint(spec: SweepSpec, model: SweptModel, data: SweepData) -> Measured:
    """Measures one checkpoint.

    Returns:
      For each bucket, the sums of `measure_clean` and `measure_ablations`, [microbatch, …] each; with probes, also the
      right answers per sequence: `probe/<target>` and `probe/current_vs_stale_binary` [microbatch, B, 2 S], and
      `probe/current_vs_stale` [microbatch, B, S]. With probes, sums over the whole probe set: `null/<target>`,
      `null/current_vs_stale_binary` [P - 1, splits, 2 S] and `null/current_vs_stale` [P - 1, splits, S], right answers
      of probes fitted on permuted labels.
      If asked for, the states at all reads [2 S, reads, D] and their spread [2 S, 1 + Z], as of `ReadStates`.
    """
    config, params = spec.config, model.params
    key_ids, value_ids = np.array(spec.key_ids), np.array(spec.value_ids)
    means = features = None
    if data.fit is not None:
        means, features = component_means(params, config, data.fit, features=spec.probes)

    clean_pass = functools.partial(
        measure_clean,
        params,
        config,
        key_directions=model.key_directions,
        value_ids=value_ids,
        key_ids=key_ids,
        num_splits=spec.num_splits,
        keep_value_logits=spec.value_logits,
    )

    writes = HeadWrites.of(params, config)  # once, not per microbatch

    def ablate(
        batch: EncodedRecords, run: CleanRun, horizon: int, rows: Trace | None, donors: jax.Array | None
    ) -> Sums:
        return measure_ablations(
            params,
            config,
            writes,
            run.cut(horizon),
            batch,
            kinds=spec.ablations,
            lift=spec.interventions,
            value_ids=value_ids,
            num_splits=spec.num_splits,
            rows=rows,
            donors_JxBxT=donors,
        )

    results, states = [], []
    if "resample" in spec.ablations:
        # Resampling draws from every record of a split, so that all clean runs come before the first ablation.
        runs = []
        for batches in data.buckets:
            sums, run, at_reads = jax.lax.map(clean_pass, batches)
            results.append(sums)
            runs.append(run)
            states.append(at_reads)
        rows = replacement_rows(config, means, runs)
        for sums, *parts, horizon in zip(results, data.buckets, runs, data.donors, spec.horizons, strict=True):
            sums |= jax.lax.map(lambda part, h=horizon: ablate(part[0], part[1], h, rows, part[2]), tuple(parts))
    else:
        by_mean = {"mean", "role_mean"} & set(spec.ablations)
        rows = replacement_rows(config, means, ()) if by_mean else None

        def clean_and_ablations(batch: EncodedRecords, horizon: int) -> tuple[Sums, jax.Array]:
            # One microbatch after another, so that its clean run is still in cache when it is restarted from.
            sums, run, at_reads = clean_pass(batch)
            return sums | (ablate(batch, run, horizon, rows, None) if spec.ablations else {}), at_reads

        for batches, horizon in zip(data.buckets, spec.horizons, strict=True):
            sums, at_reads = jax.lax.map(functools.partial(clean_and_ablations, horizon=horizon), batches)
            results.append(sums)
            states.append(at_reads)
    if not (spec.probes or spec.states):
        return results, {}, None
    at_reads = jnp.concatenate([flatten_reads(x) for x in states], axis=1)  # [2 S, reads, D]
    kept = (at_reads, spread_of_states(at_reads, data.rows_of_splits)) if spec.states else None
    if not spec.probes:
        return results, {}, kept
    system, probes = fit_all_probes(features, data.fit, data.permutations, key_ids=key_ids, value_ids=value_ids)
    return *_score_probes(spec, system, probes, data.buckets, at_reads, results), kept


def _score_probes(
    spec: SweepSpec,
    system: RidgeSystem,
    probes: dict[str, RidgeProbes],
    buckets: tuple[EncodedRecords, ...],
    states_GxNxD: jax.Array,
    results: list[Sums],
) -> tuple[list[Sums], Sums]:
    """Adds every sequence's right probe answers to the results; returns them and the permuted probes' by split."""
    key_ids, value_ids = np.array(spec.key_ids), np.array(spec.value_ids)
    rows = standardise(system, states_GxNxD)
    by_bucket = [probe_labels(batches, key_ids=key_ids, value_ids=value_ids) for batches in buckets]
    labels = {target: jnp.concatenate([x[target] for x in by_bucket]) for target in PROBE_TARGETS}
    splits = jnp.concatenate([jnp.repeat(x.splits.reshape(-1), x.is_read.shape[-1]) for x in buckets])
    in_split = (splits[:, None] == jnp.arange(spec.num_splits)[None]).astype(jnp.float32)

    def right_answers(probe: dict[str, tuple[jax.Array, jax.Array]], rows_NxD: jax.Array) -> dict[str, jax.Array]:
        """Checks whether each read's label wins, and whether its current value beats the stale one: bool [reads]."""
        scores = {target: probe_scores(*probe[target], rows_NxD) for target in PROBE_TARGETS}
        right = {target: label_wins(scores[target], labels[target]) for target in PROBE_TARGETS}
        both = labels["value"], labels["stale_value"]
        right["current_vs_stale"] = ranks_above(scores["value"], *both)
        right["current_vs_stale_binary"] = ranks_above(scores["value"], *both, minus_YxN=scores["stale_value"])
        return right

    def of_group(group: tuple[dict[str, jax.Array], jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        weights_PxKxD, rows_NxD = group
        fitted = {target: (weights_PxKxD[target], probes[target].intercepts) for target in PROBE_TARGETS}

        def by_split(probe: dict[str, tuple[jax.Array, jax.Array]]) -> dict[str, jax.Array]:
            right = right_answers(probe, rows_NxD)
            return {name: jnp.matmul(x.astype(jnp.float32), in_split, precision="highest") for name, x in right.items()}

        real = right_answers(jax.tree.map(lambda x: x[0], fitted), rows_NxD)
        return real, jax.lax.map(by_split, jax.tree.map(lambda x: x[1:], fitted))

    # [2 S, reads] and [2 S, P - 1, splits] of each.
    per_read, nulls = jax.lax.map(of_group, ({target: probes[target].weights for target in PROBE_TARGETS}, rows))
    # The ranking is of the states at p_e alone.
    stages = len(rows) // 2
    per_read["current_vs_stale"] = per_read["current_vs_stale"][:stages]
    nulls["current_vs_stale"] = nulls["current_vs_stale"][:stages]
    offset = 0
    for batches, sums in zip(buckets, results, strict=True):
        size = batches.is_read.size
        for target, right in per_read.items():
            own = right[:, offset : offset + size].T.reshape(*batches.is_read.shape, -1)
            sums[f"probe/{target}"] = jnp.sum(own, axis=2)
        offset += size
    return results, {f"null/{target}": jnp.moveaxis(x, 0, -1) for target, x in nulls.items()}
