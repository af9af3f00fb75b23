"""The inputs of every kind of intervention: parameters of a window's checkpoints, pairs, fit set and probe set."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import xarray as xr

from kvjax.execution.fit_set import ComponentMeans, check_roles, component_means
from kvjax.execution.over_pairs import OverPairs
from kvjax.intervene.ablations import DEFAULT_ABLATION
from kvjax.intervene.metrics import DEFAULT_METRIC, METRICS, UNITS
from kvjax.intervene.recovery import STATISTICS, PairGroups
from kvjax.model.components import Component
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params
from kvjax.task.encoding import Bucket, EncodedRecords, bucket_by_length, microbatches
from kvjax.task.pair_encoding import EncodedPairs
from kvjax.task.vocabulary import Vocabulary

# Tokens per microbatch of pairs: windows are short, so that more streams than a sweep's microbatch holds fit the cache.
CPU_TOKENS_PER_BATCH = 2500

# Sizes that pairs are padded to. More sizes pad less and take longer to compile: worth it from so many pairs times
# checkpoints on.
FEW_BUCKETS, MANY_BUCKETS, MANY_RUNS = 2, 4, 500

ANSWER_ACCURACY = {"long_name": "share of affected reads whose argmax is the clean answer", "units": "1"}
CLEAN_METRIC = {"long_name": "metric, mean over affected reads of clean streams", "units": UNITS}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The results of one kind of intervention in one window.

    Attributes:
      dataset: every number, labelled.
      summary: the part of the summary document that the kind writes: `baseline`, `effects` and `controls`.
    """

    dataset: xr.Dataset
    summary: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class InterventionInputs:
    """The checkpoints of one window, and the streams that are run through them.

    Attributes:
      config: the checkpoints' shape.
      vocabulary: of the benchmark.
      steps: the checkpoints, ascending.
      stacked: their parameters, stacked on a leading axis C.
      encoded: the pairs.
      pair_ids: their names.
      clean: the distinct clean streams of the pairs, and which of them each pair's is (`clean_rows`).
      fit: the fit set.
      records: the probe set.
      components: the set that is tested; None for the smallest faithful one.
      devices: how many devices share the pairs.
      tokens_per_batch: about how many tokens a microbatch of pairs holds.
      record_tokens_per_batch: likewise of the probe set's and the fit set's records.
      metric: of `METRICS`, whose effects are ranked and, if a gradient is taken, differentiated.
      rank_by: of `ABLATIONS`, by whose cost components are ranked.
    """

    config: DecoderConfig
    vocabulary: Vocabulary
    steps: tuple[int, ...]
    stacked: Params
    encoded: EncodedPairs
    pair_ids: tuple[str, ...]
    clean: EncodedRecords
    clean_rows: np.ndarray
    fit: EncodedRecords
    records: EncodedRecords
    components: tuple[Component, ...] | None
    devices: int
    tokens_per_batch: int
    record_tokens_per_batch: int
    metric: str = DEFAULT_METRIC
    rank_by: str = DEFAULT_ABLATION

    @functools.cached_property
    def over_pairs(self) -> OverPairs:
        """The pairs in microbatches, for measurements that compute from the first changed token on."""
        return self._in_microbatches(self.encoded)

    @functools.cached_property
    def over_gradients(self) -> OverPairs:
        """Likewise, for measurements that take longer to compile for a size than padding costs: half as many sizes."""
        return self._in_microbatches(self.encoded, max_buckets=self.max_buckets // 2)

    @functools.cached_property
    def over_predictions(self) -> OverPairs:
        """Likewise, for edits at the affected reads' p_e: from the first of them on, which is most often the last."""
        return self._from_first(self.encoded.prediction_positions, widen=4)

    @functools.cached_property
    def over_supports(self) -> OverPairs:
        """Likewise, for edits at the affected reads' supports in the clean stream."""
        return self._from_first(self.encoded.support_positions, widen=2)

    @functools.cached_property
    def over_streams(self) -> OverPairs:
        """Likewise, for measurements that compute whole streams, up to the last affected read.

        Half as many sizes, here and for edits at reads: these programs take longer to compile than padding costs.
        """
        return self._in_microbatches(self.encoded, whole_streams=True, max_buckets=self.max_buckets // 2)

    def over_rows(self, rows: Callable[[int], int]) -> OverPairs:
        """Likewise as `over_pairs`, for measurements that compute several variants of a pair at once.

        Args:
          rows: how many positions they compute at once of each pair, given its window.
        """
        return self._in_microbatches(self.encoded, most_pairs=lambda window: self.tokens_per_batch // rows(window))

    def _from_first(self, positions_NxQ: np.ndarray, *, widen: int) -> OverPairs:
        """Computes pairs from the first of some positions on; microbatches are so many times as large."""
        first = np.where(self.encoded.is_affected, positions_NxQ, np.iinfo(np.int32).max).min(axis=1)
        encoded = dataclasses.replace(self.encoded, first_changed=first.astype(np.int32))
        tokens = widen * self.tokens_per_batch
        return self._in_microbatches(encoded, tokens_per_batch=tokens, max_buckets=self.max_buckets // 2)

    def _in_microbatches(self, encoded: EncodedPairs, **other: Any) -> OverPairs:
        """Cuts pairs into microbatches; `other` says what is not as usual."""
        usual = {"tokens_per_batch": self.tokens_per_batch, "max_buckets": self.max_buckets}
        return OverPairs(encoded, devices=self.devices, **usual | other)

    @property
    def max_buckets(self) -> int:
        """How many different sizes pairs and streams are padded to."""
        return MANY_BUCKETS if len(self.encoded) * len(self.steps) >= MANY_RUNS else FEW_BUCKETS

    @property
    def chance(self) -> float:
        """The share of reads at which a value drawn at random is the answer."""
        return 1 / len(self.vocabulary.value_tokens)

    @functools.cached_property
    def groups(self) -> PairGroups:
        """The kinds of pairs, and resamples."""
        return PairGroups.of(self.encoded)

    @functools.cached_property
    def fit_bucket(self) -> Bucket:
        """The fit set in microbatches of one length."""
        (bucket,) = bucket_by_length(self.fit, tokens_per_batch=self.record_tokens_per_batch, max_buckets=1)
        return bucket

    @functools.cached_property
    def clean_batches(self) -> EncodedRecords:
        """The distinct clean streams in microbatches, in order, filled up at the end."""
        size = max(1, self.record_tokens_per_batch // self.clean.tokens.shape[1])
        return microbatches(self.clean, np.arange(len(self.clean)), size)[0]

    @functools.cached_property
    def means(self) -> dict[str, np.ndarray]:
        """Mean component outputs of every checkpoint: `head_z` [C, L, 1, 1, H, E] and `mlp_out` [C, L, 1, 1, D]."""
        return self._component_means.overall

    @functools.cached_property
    def role_means(self) -> dict[str, np.ndarray]:
        """The same over the tokens of each role: `head_z` [C, L, roles, H, E] and `mlp_out` [C, L, roles, D].

        `token_roles` of encoded records index the roles; -1 is the first token's, which comes last.

        Raises:
          InputError: the fit set lacks a role that the probe set has.
        """
        check_roles(self.fit, self.records)
        return self._component_means.by_role

    @functools.cached_property
    def _component_means(self) -> ComponentMeans:
        return self.each_checkpoint(_means, self.fit_bucket.batches)

    def checkpoint(self, index: int) -> Params:
        """Cuts one checkpoint's parameters out of the stack."""
        return jax.tree.map(lambda x: x[index], self.stacked)

    def each_checkpoint(self, function: Any, *shared: Any) -> Any:
        """Runs `function(config, params, *shared)` at every checkpoint and stacks the results; compiled once."""
        each = [jax.device_get(function(self.config, self.checkpoint(c), *shared)) for c in range(len(self.steps))]
        return jax.tree.map(lambda *x: np.stack(x), *each)

    def dataset(self, **coords: Sequence[Any]) -> xr.Dataset:
        """Makes an empty dataset with the coordinates that all results share, and further ones."""
        return xr.Dataset(
            coords={
                "statistic": list(STATISTICS),
                "metric": list(METRICS),
                "pair_kind": self.groups.kinds,
                "step": list(self.steps),
                **{name: list(values) for name, values in coords.items()},
            }
        )


@functools.partial(jax.jit, static_argnums=0)
def _means(config: DecoderConfig, params: Params, batches: EncodedRecords) -> ComponentMeans:
    return component_means(params, config, batches, features=False)[0]


def numbers(estimate_low_high: np.ndarray) -> dict[str, float | None]:
    """Writes an estimate with its interval as JSON has it."""
    return {name: number(x) for name, x in zip(STATISTICS, estimate_low_high, strict=True)}


def number(value: Any) -> float | None:
    """Rounds to a Python number of six digits; None if the value does not exist."""
    value = float(value)
    return float(f"{value:.6g}") if np.isfinite(value) else None
