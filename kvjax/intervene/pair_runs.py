"""A batch of pairs as two runs, what is read off an intervened one, and programs over pairs and checkpoints.

The metric is logit(clean answer) - logit(corrupted answer) at the prediction position of every affected read, the same
two tokens in every run (docs/definitions.md, section 9).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.devices import Placement
from kvjax.measure.behaviour import answer_correct
from kvjax.model.decoder import DecoderConfig, Params
from kvjax.model.interventions import Interventions
from kvjax.model.restart import RESTART_CAPTURE, WINDOW_CAPTURE, CleanRun, restart, run_clean
from kvjax.model.sites import take_positions
from kvjax.model.transforms import over_checkpoints
from kvjax.task.pair_encoding import EncodedPairs, PairBucket, bucket_by_window

# Denoising puts activations of the clean run into the corrupted one, noising those of the corrupted into the clean.
DIRECTIONS = ("denoising", "noising")
DENOISING, NOISING = range(2)

PAIR_CAPTURE = (*RESTART_CAPTURE, *WINDOW_CAPTURE, "final_norm")

MEASURES = ("difference", "clean_correct", "corrupted_correct")

Effects = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairRuns:
    """Both runs of a batch of pairs.

    Attributes:
      base: the run that is intervened on.
      source: the run that activations are taken from.
      batch: the pairs.
      window_BxW: the positions that a change can reach, first to last; the last repeated where the stream ends.
      base_effects, source_effects: of the two runs, see `answer_effects`.
    """

    base: CleanRun
    source: CleanRun
    batch: EncodedPairs
    window_BxW: jax.Array
    base_effects: Effects
    source_effects: Effects


def run_pairs(
    params: Params, config: DecoderConfig, batch: EncodedPairs, direction: jax.Array | int, *, window: int
) -> PairRuns:
    """Returns both runs of a batch of pairs, each keeping what restarts and patches need.

    Args:
      params, config: one checkpoint.
      batch: the pairs.
      direction: index into `DIRECTIONS`; where it is traced, one program serves both.
      window: positions computed, from the first changed one on.
    """
    runs, effects = [], []
    for tokens in (batch.clean_tokens, batch.corrupted_tokens):
        logits, run = run_clean(params, config, jnp.asarray(tokens), PAIR_CAPTURE)
        runs.append(run)
        effects.append(answer_effects(take_positions(logits, batch.prediction_positions, 1), batch))
    last = batch.clean_tokens.shape[1] - 1
    window_BxW = jnp.minimum(batch.first_changed[:, None] + jnp.arange(window)[None], last)
    clean, corrupted = zip(runs, effects, strict=True)
    if isinstance(direction, int):
        (base, base_effects), (source, source_effects) = (
            (corrupted, clean) if direction == DENOISING else (clean, corrupted)
        )
    else:
        (base, base_effects), (source, source_effects) = (
            jax.tree.map(lambda a, b: jnp.where(direction == DENOISING, a, b), *both)
            for both in ((corrupted, clean), (clean, corrupted))
        )
    return PairRuns(base, source, batch, window_BxW, base_effects, source_effects)


def both_directions(function: Callable[[jax.Array], Effects]) -> Effects:
    """Returns what a function of the direction gives for each of `DIRECTIONS`, on the axis after the pairs."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), jax.lax.map(function, jnp.arange(len(DIRECTIONS))))


def answer_effects(logits_BxQxV: jax.Array, batch: EncodedPairs) -> Effects:
    """Returns what a run says about the affected reads of each pair, summed over them: [B] each.

    `difference`: logit(clean answer) - logit(corrupted answer). `clean_correct`, `corrupted_correct`: reads whose
    argmax over the vocabulary is the one answer or the other.
    """

    def logit(tokens_BxQ: jax.Array) -> jax.Array:
        return jnp.take_along_axis(logits_BxQxV, jnp.asarray(tokens_BxQ)[..., None], axis=-1)[..., 0]

    per_read = {
        "difference": logit(batch.clean_answers) - logit(batch.corrupted_answers),
        "clean_correct": answer_correct(logits_BxQxV, batch.clean_answers).astype(jnp.float32),
        "corrupted_correct": answer_correct(logits_BxQxV, batch.corrupted_answers).astype(jnp.float32),
    }
    return {name: jnp.sum(jnp.where(batch.is_affected, x, 0.0), axis=-1) for name, x in per_read.items()}


def effects_under(
    params: Params,
    config: DecoderConfig,
    runs: PairRuns,
    edits: Interventions,
    layer: jax.Array | int,
    *,
    windowed: bool = True,
) -> Effects:
    """Returns the effects of edits on the base run, restarted in `layer`; inside the window alone where `windowed`."""
    logits = restart(
        params,
        config,
        runs.base,
        edits,
        layer=layer,
        positions_BxQ=runs.batch.prediction_positions,
        window_BxW=runs.window_BxW if windowed else None,
    )
    return answer_effects(logits, runs.batch)


def with_runs(effects: Effects, runs: PairRuns) -> Effects:
    """Returns effects with those of the two runs without intervention beside them: `<name>_base`, `<name>_source`."""
    effects = effects | {f"{name}_base": x for name, x in runs.base_effects.items()}
    return effects | {f"{name}_source": x for name, x in runs.source_effects.items()}


class PairProgram:
    """Pairs on the devices, and how functions of a batch of them run over all pairs and checkpoints.

    Args:
      encoded: the pairs.
      config: the checkpoints' shape.
      tokens_per_batch: about how many tokens a microbatch holds.
      devices: how many devices share the checkpoints.
      max_buckets: how many different windows pairs are padded to; each is compiled.

    Attributes:
      buckets: the pairs by window, in microbatches.
    """

    def __init__(
        self,
        encoded: EncodedPairs,
        config: DecoderConfig,
        *,
        tokens_per_batch: int,
        devices: int = 1,
        max_buckets: int = 2,
    ):
        self.encoded, self.config = encoded, config
        self.buckets = bucket_by_window(encoded, tokens_per_batch=tokens_per_batch, max_buckets=max_buckets)
        self._devices = devices

    def run(
        self, measure: Measure, stacked: Any, *shared: Any, per_bucket: Sequence[Any] | None = None
    ) -> dict[str, np.ndarray]:
        """Returns what a function measures on every pair at every checkpoint.

        Args:
          measure: from one checkpoint's tree, one microbatch with its own `per_bucket` entry, the bucket's window and
            `shared` to arrays with a leading axis B.
          stacked: parameters, or a tree that holds them, with a leading checkpoint axis C.
          *shared: whatever all of them need.
          per_bucket: for each bucket, arrays with a leading microbatch axis.

        Returns:
          The arrays, [C, N, …], in the order of the pairs.
        """
        checkpoints = len(jax.tree.leaves(stacked)[0])
        # As many at once as devices share, filled up at the end: windows of any length are one compiled program.
        devices = min(self._devices, checkpoints)
        by_chunk = []
        for start in range(0, checkpoints, devices):
            rows = np.minimum(np.arange(start, start + devices), checkpoints - 1)
            chunk = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], stacked)
            collected: dict[str, np.ndarray] = {}
            for index, bucket in enumerate(self.buckets):
                extra = per_bucket[index] if per_bucket is not None else None
                outputs = _over_pairs(measure, bucket.window, devices, chunk, bucket.batches, extra, shared)
                self._collect(collected, bucket, jax.device_get(outputs), devices)
            by_chunk.append(collected)
        return {name: np.concatenate([x[name] for x in by_chunk])[:checkpoints] for name in by_chunk[0]}

    def _collect(
        self, collected: dict[str, np.ndarray], bucket: PairBucket, outputs: dict[str, np.ndarray], checkpoints: int
    ) -> None:
        real = bucket.indices >= 0
        for name, x in outputs.items():
            rows = x[:checkpoints].reshape(checkpoints, -1, *x.shape[3:])[:, real]
            if name not in collected:
                collected[name] = np.full((checkpoints, len(self.encoded), *rows.shape[2:]), np.nan, np.float32)
            elif rows.shape[2:] != collected[name].shape[2:]:  # a longer window than those before
                missing = [(0, max(0, n - m)) for n, m in zip(rows.shape, collected[name].shape, strict=True)]
                missing[:2] = [(0, 0), (0, 0)]
                collected[name] = np.pad(collected[name], missing, constant_values=np.nan)
            place = (slice(None), bucket.indices[real], *(slice(n) for n in rows.shape[2:]))
            collected[name][place] = rows


@functools.cache
def measuring(function: Callable[..., Any], *static: Any) -> Measure:
    """Returns a function with its first arguments given, the same object for the same ones: compiled once."""
    return functools.partial(function, *static)


# (one checkpoint's tree, microbatch, its extra, window, shared) -> arrays [B, …]
Measure = Callable[..., dict[str, jax.Array]]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _over_pairs(measure, window, devices, stacked, batches, extra, shared):
    def one_checkpoint(tree: Any, batches: EncodedPairs, extra: Any, shared: Any) -> dict[str, jax.Array]:
        return jax.lax.map(lambda part: measure(tree, part[0], part[1], window, *shared), (batches, extra))

    return over_checkpoints(one_checkpoint, Placement(devices))(stacked, batches, extra, shared)
