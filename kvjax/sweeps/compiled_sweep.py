"""Compiles a sweep: a probe set on the devices, with the program that measures checkpoints on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from kvjax.devices import backend, device_count, fillable_memory_gb
from kvjax.execution.export_cache import LoweredFunction, compile_beside, kept_lowered
from kvjax.execution.fit_set import check_roles
from kvjax.execution.memory_plan import plan_chunks
from kvjax.execution.over_checkpoints import over_chunks
from kvjax.execution.states_at_reads import ReadStates, rows_of_splits
from kvjax.execution.unbucket import unbucket
from kvjax.measure.weight_spectra import LEADING, HeadSpectra, head_spectra
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params
from kvjax.sweeps.ablations import restarts_at_once
from kvjax.sweeps.clean import Sums
from kvjax.sweeps.measure_checkpoint import SweepData, SweepSpec, SweptModel, measure_checkpoints
from kvjax.sweeps.settings import SweepSettings
from kvjax.task.donors import donors_by_bucket, draw_donors
from kvjax.task.encoding import Bucket, EncodedRecords, bucket_by_length
from kvjax.task.vocabulary import Vocabulary

CheckpointArrays = dict[str, np.ndarray]

NULL_PERMUTATIONS = 20
NULL_SEED = 0
DONOR_SEED = 0


class CompiledSweep:
    """A probe set on the devices, with the compiled program that measures checkpoints of one shape on it.

    Args:
      config: the checkpoints' shape.
      vocabulary: the benchmark's.
      encoded: the probe records.
      num_splits: number of splits they are in.
      settings: what to measure, and how.
      fit: the fit set's records, which mean and role-mean ablation and probes need.
      max_buckets: how many lengths records are padded to.

    Raises:
      InputError: records lack what an ablation takes from them, see `draw_donors` and `check_roles`.

    Attributes:
      spec: the static settings that the program is compiled for.
      data: the records, on the devices.
      buckets: how they are cut into microbatches.
      chunk: checkpoints per call.
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
        by_mean = {"mean", "role_mean"} & set(settings.ablations)
        needs_fit = probes or bool(by_mean)
        plan = plan_chunks(
            settings.checkpoint_batch,
            config,
            backend=backend(),
            num_devices=device_count(),
            num_tokens=max(encoded.tokens.size, fit.tokens.size if needs_fit and fit else 0),
            memory_gb=fillable_memory_gb(settings.memory_gb),
            side_by_side=restarts_at_once(config, settings.ablations, draws=settings.resample_draws),
            keeps_runs="resample" in settings.ablations,
        )
        self.chunk = plan.checkpoints
        self._shape = encoded.is_read.shape
        self.buckets = bucket_by_length(encoded, tokens_per_batch=plan.tokens_per_batch, max_buckets=max_buckets)
        donors: tuple[np.ndarray, ...] = ()
        if "resample" in settings.ablations:
            drawn = draw_donors(encoded, draws=settings.resample_draws, seed=DONOR_SEED)
            donors = donors_by_bucket(drawn, self.buckets)
        fit_bucket = None
        if needs_fit:
            assert fit is not None, "mean ablation, role-mean ablation and probes need a fit set"
            if "role_mean" in by_mean:
                check_roles(fit, encoded)
            (fit_bucket,) = bucket_by_length(fit, tokens_per_batch=plan.tokens_per_batch, max_buckets=1)
        data = SweepData(
            buckets=tuple(bucket.batches for bucket in self.buckets),
            rows_of_splits=rows_of_splits(self.buckets, num_splits),
            donors=donors,
            fit=fit_bucket and fit_bucket.batches,
            permutations=read_permutations(fit_bucket, count=NULL_PERMUTATIONS, seed=NULL_SEED) if probes else None,
        )
        self.spec = SweepSpec(
            config=dataclasses.replace(config, precision=settings.precision),
            value_ids=tuple(vocabulary.value_ids.tolist()),
            key_ids=tuple(vocabulary.key_ids.tolist()),
            num_splits=num_splits,
            horizons=tuple(bucket.horizon for bucket in self.buckets),
            ablations=settings.ablations,
            probes=probes,
            states=settings.event_drift,
            value_logits=bool(settings.ablations),  # a sweep compares checkpoints by them, an evaluation does not
            interventions=plan.interventions,
            placement=plan.placement,
        )
        self.data = jax.device_put(data, plan.placement.whole)
        self._measure: dict[bool, LoweredFunction] = {}  # by whether unembeddings are tied
        self._compiling: dict[bool, Future[Any]] = {}  # likewise

    def compile_ahead(self, shapes: Params) -> ReadStates | None:
        """Traces the program here and compiles it in a thread, which `dispatch` waits for; does nothing if it is there.

        Args:
          shapes: of one checkpoint's parameters.

        Returns:
          Shapes and shardings of the states at the reads that `dispatch` will return, if it is a new program of them.
        """
        config, tied = self.spec.config, "unembedding" not in shapes
        if tied in self._measure:
            return None

        def stacked(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.chunk, *x.shape), x.dtype)

        rank = min(LEADING, config.d_head)
        directions = jax.ShapeDtypeStruct((config.n_layers, config.n_heads, config.d_model, rank), np.float32)
        models = SweptModel(jax.tree.map(stacked, shapes), stacked(directions))
        lowered = self._program(models).lower(models, self.data)
        self._compiling[tied] = compile_beside(lowered)
        *_, states = lowered.out_info
        on_devices = self.spec.placement.split
        return states and ReadStates(*(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_devices) for x in states))

    def _program(self, models: SweptModel) -> LoweredFunction:
        tied = "unembedding" not in models.params
        if tied not in self._measure:
            spec = dataclasses.replace(self.spec, config=dataclasses.replace(self.spec.config, tied=tied))
            self._measure[tied] = kept_lowered(measure_checkpoints, spec, models, self.data)
        return self._measure[tied]

    def dispatch(
        self, params: Sequence[Params], spectra: Sequence[HeadSpectra]
    ) -> tuple[tuple[list[Sums], Sums], ReadStates | None]:
        """Starts the devices on exactly `chunk` checkpoints, without waiting for them.

        Args:
          params: their parameters.
          spectra: those of each one's heads.

        Returns:
          What `collect` takes, and the states at the reads if they are wanted, [C, …] each.
        """
        stacked = SweptModel.stack(params, spectra)
        if compiling := self._compiling.pop("unembedding" not in stacked.params, None):
            compiling.result()
        by_bucket, whole, states = self._program(stacked)(stacked, self.data)
        return (by_bucket, whole), states and ReadStates(*states)

    def collect(self, outputs: tuple[list[CheckpointArrays], CheckpointArrays]) -> list[CheckpointArrays]:
        """Collects the measured arrays of each checkpoint from the devices' outputs, in the records' order."""
        by_bucket, whole = outputs
        num_records, num_reads = self._shape
        arrays = unbucket(by_bucket, self.buckets, num_records, num_reads=num_reads) | whole
        return [{name: array[c] for name, array in arrays.items()} for c in range(len(arrays["read/correct"]))]

    def measure(self, params: Iterable[Params]) -> list[CheckpointArrays]:
        """Measures checkpoints, with one mapping of arrays each."""

        def dispatch(chunk: list[Params]) -> tuple[list[Sums], Sums]:
            return self.dispatch(chunk, [head_spectra(own, self.spec.config.n_heads) for own in chunk])[0]

        chunks = over_chunks(dispatch, params, size=self.chunk)
        return [arrays for chunk in chunks for arrays in self.collect(chunk.outputs)]


def read_permutations(fit: Bucket, *, count: int, seed: int) -> np.ndarray:
    """Draws orders of the fit reads' rows, int32 [1 + count, rows]: the identity, then seeded permutations.

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
