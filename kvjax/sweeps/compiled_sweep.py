"""A probe set on the devices, with the compiled program that measures checkpoints on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kvjax.execution.export_cache import kept_lowered
from kvjax.execution.memory_plan import plan_chunks
from kvjax.execution.unbucket import unbucket
from kvjax.model.decoder import DecoderConfig, Params, stack_params
from kvjax.model.transforms import checkpoint_mesh
from kvjax.sweeps.ablations import restarts_at_once
from kvjax.sweeps.measure_checkpoint import Program, SweepData, measure_checkpoints
from kvjax.sweeps.settings import SweepSettings
from kvjax.task.donors import donors_by_bucket, draw_donors
from kvjax.task.encoding import Bucket, EncodedRecords, bucket_by_length
from kvjax.task.vocabulary import Vocabulary

NULL_PERMUTATIONS = 20
NULL_SEED = 0
DONOR_SEED = 0


class ProbeProgram:
    """A probe set on the devices, with the compiled program that measures checkpoints of one shape on it.

    Args:
      config: the checkpoints' shape.
      vocabulary: of the benchmark.
      encoded: the probe records.
      num_splits: splits they are in.
      settings: what is measured, and how.
      fit: the fit set's records, which mean ablation and probes need.
      max_buckets: how many lengths records are padded to.

    Attributes:
      program: the static settings that the program is compiled for.
      data: the records, on the devices.
      buckets: how they are cut into microbatches.
      chunk, devices: checkpoints per call, and how many devices share them.
    """

    def __init__(
        self,
        config: DecoderConfig,
        vocabulary: Vocabulary,
        encoded: EncodedRecords,
        num_splits: int,
        settings: SweepSettings,
        *,
        fit: EncodedRecords | None = None,
        max_buckets: int = 3,
    ):
        probes = settings.probe != "none"
        needs_fit = probes or "mean" in settings.ablations
        plan = plan_chunks(
            settings.checkpoint_batch,
            config,
            backend=jax.default_backend(),
            num_devices=jax.local_device_count(),
            num_tokens=max(encoded.tokens.size, fit.tokens.size if needs_fit and fit else 0),
            memory_gb=settings.memory_gb,
            side_by_side=restarts_at_once(config, settings.ablations, draws=settings.resample_draws),
            keeps_runs="resample" in settings.ablations,
        )
        self.chunk, self.devices = plan.checkpoints, plan.devices
        self._shape = encoded.is_read.shape
        self.buckets = bucket_by_length(encoded, tokens_per_batch=plan.tokens_per_batch, max_buckets=max_buckets)
        donors: tuple[np.ndarray, ...] = ()
        if "resample" in settings.ablations:
            drawn = draw_donors(encoded, draws=settings.resample_draws, seed=DONOR_SEED)
            donors = donors_by_bucket(drawn, self.buckets)
        fit_bucket = None
        if needs_fit:
            assert fit is not None, "mean ablation and probes need a fit set"
            (fit_bucket,) = bucket_by_length(fit, tokens_per_batch=plan.tokens_per_batch, max_buckets=1)
        data = SweepData(
            buckets=tuple(bucket.batches for bucket in self.buckets),
            donors=donors,
            fit=fit_bucket and fit_bucket.batches,
            permutations=read_permutations(fit_bucket, count=NULL_PERMUTATIONS, seed=NULL_SEED) if probes else None,
        )
        self.program = Program(
            config=dataclasses.replace(config, precision=settings.precision),
            value_ids=tuple(vocabulary.value_ids.tolist()),
            key_ids=tuple(vocabulary.key_ids.tolist()),
            num_splits=num_splits,
            horizons=tuple(bucket.horizon for bucket in self.buckets),
            ablations=settings.ablations,
            probes=probes,
            states=settings.event_drift,
            interventions=plan.interventions,
            checkpoints=plan.over_checkpoints,
            devices=plan.devices,
        )
        self.data = jax.device_put(data, NamedSharding(checkpoint_mesh(plan.devices), PartitionSpec()))
        self._measure: dict[bool, Callable[..., Any]] = {}  # by whether unembeddings are tied

    def start(self, params: Sequence[Params]) -> PendingMeasurement:
        """Starts measuring up to `chunk` checkpoints, without waiting for the devices."""
        # A last, shorter chunk is filled up: another number of checkpoints would be another program to compile.
        filled = [*params, *[params[-1]] * (self.chunk - len(params))]
        stacked = stack_params(filled)
        tied = "unembedding" not in stacked
        program = dataclasses.replace(self.program, config=dataclasses.replace(self.program.config, tied=tied))
        if tied not in self._measure:
            self._measure[tied] = kept_lowered(measure_checkpoints, program, stacked, self.data)
        *outputs, states = self._measure[tied](stacked, self.data)
        return PendingMeasurement(outputs, states, len(params), tuple(self.buckets), self._shape)

    def measure(self, params: Sequence[Params]) -> list[dict[str, np.ndarray]]:
        """Returns the measured arrays of up to `chunk` checkpoints, one mapping each."""
        return self.start(params).collect()


@dataclasses.dataclass(frozen=True)
class PendingMeasurement:
    """Checkpoints that the devices are measuring; their states stay on the devices."""

    outputs: Any
    states: jax.Array | None
    num_checkpoints: int
    buckets: tuple[Bucket, ...]
    shape: tuple[int, int]

    def collect(self) -> list[dict[str, np.ndarray]]:
        """Returns the measured arrays, one mapping per checkpoint, once they are there."""
        by_bucket, whole = jax.device_get(self.outputs)
        arrays = unbucket(by_bucket, self.buckets, self.shape[0], num_reads=self.shape[1]) | whole
        return [{name: array[c] for name, array in arrays.items()} for c in range(self.num_checkpoints)]


def read_permutations(fit: Bucket, *, count: int, seed: int) -> np.ndarray:
    """Returns orders of the fit reads' rows, int32 [1 + count, rows]: the identity, then seeded permutations.

    Only rows that are reads change places, and their order before is that of the records, so that the permutations do
    not depend on how the records are batched.
    """
    counted = (fit.batches.is_read & (fit.batches.weights > 0)[..., None]).reshape(len(fit.indices), -1)
    rows = np.arange(counted.size).reshape(counted.shape)
    in_order = np.argsort(fit.indices, kind="stable")
    reads = rows[in_order][counted[in_order]]
    rng = np.random.default_rng(seed)
    orders = np.tile(rows.reshape(-1), (1 + count, 1)).astype(np.int32)
    for order in orders[1:]:
        order[reads] = rng.permutation(reads)
    return orders
