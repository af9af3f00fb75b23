"""Runs both streams of a batch of pairs, and measures what an intervention does to their answers.

Metrics (`METRICS`) are read at the prediction position of every affected read, of the same two tokens in every run
(docs/definitions.md, "Pairs of streams").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kvjax.measure.behaviour import answer_correct
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.interventions import Interventions
from kvjax.model.params import Params
from kvjax.model.restart import RESTART_CAPTURE, WINDOW_CAPTURE, CleanRun, restart, run_clean
from kvjax.model.sites import take_positions
from kvjax.task.pair_encoding import EncodedPairs
from kvjax.task.stream_reads import StreamReads

# Denoising puts activations of the clean run into the corrupted one, noising those of the corrupted into the clean.
DIRECTIONS = ("denoising", "noising")
DENOISING, NOISING = range(2)

PAIR_CAPTURE = (*RESTART_CAPTURE, *WINDOW_CAPTURE, "final_norm")

Effects = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairRuns:
    """Both runs of a batch of pairs, one of them to be intervened on.

    Attributes:
      base: the run that is intervened on.
      source: the run that activations are taken from.
      batch: the pairs.
      window_BxW: the positions that a change can reach, first to last; the last repeated if the stream ends before.
      base_at_reads, source_at_reads: `read_effects` of the two runs.
    """

    base: CleanRun
    source: CleanRun
    batch: EncodedPairs
    window_BxW: jax.Array
    base_at_reads: Effects
    source_at_reads: Effects

    @property
    def base_effects(self) -> Effects:
        """`answer_effects` of the base run."""
        return over_reads(self.base_at_reads)

    @property
    def source_effects(self) -> Effects:
        """`answer_effects` of the source run."""
        return over_reads(self.source_at_reads)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamRuns:
    """The runs of both streams of a batch of pairs, for interventions in either direction.

    Attributes:
      clean, corrupted: each run with its `read_effects`.
      batch: the pairs.
      window_BxW: the positions that a change can reach, first to last; the last repeated if the stream ends before.
    """

    clean: tuple[CleanRun, Effects]
    corrupted: tuple[CleanRun, Effects]
    batch: EncodedPairs
    window_BxW: jax.Array

    def towards(self, direction: jax.Array | int) -> PairRuns:
        """Names one run the base and the other the source; `direction` is an index into `DIRECTIONS`, maybe traced."""
        base, source = self.corrupted, self.clean
        if not isinstance(direction, int):
            base, source = (
                jax.tree.map(lambda a, b: jnp.where(direction == DENOISING, a, b), *both)
                for both in ((base, source), (source, base))
            )
        elif direction == NOISING:
            base, source = source, base
        return PairRuns(base[0], source[0], self.batch, self.window_BxW, base[1], source[1])


def run_streams(params: Params, config: DecoderConfig, batch: EncodedPairs, *, window: int) -> StreamRuns:
    """Runs both streams of a batch of pairs, each keeping what restarts and patches need.

    Args:
      params, config: one checkpoint.
      batch: the pairs.
      window: positions computed, from the first changed one on.
    """

    def of_stream(tokens: jax.Array) -> tuple[CleanRun, Effects]:
        logits, run = run_clean(params, config, jnp.asarray(tokens), PAIR_CAPTURE)
        return run, read_effects(take_positions(logits, batch.prediction_positions, 1), batch)

    streams = of_stream(batch.clean_tokens), of_stream(batch.corrupted_tokens)
    return StreamRuns(*streams, batch, window_positions(batch, window))


def run_pairs(
    params: Params, config: DecoderConfig, batch: EncodedPairs, direction: jax.Array | int, *, window: int
) -> PairRuns:
    """Runs both streams of a batch of pairs for interventions in one direction; see `run_streams`."""
    return run_streams(params, config, batch, window=window).towards(direction)


def window_positions(batch: EncodedPairs, window: int) -> jax.Array:
    """Lists the positions that a change can reach, [B, W], as `PairRuns` holds them."""
    last = batch.clean_tokens.shape[1] - 1
    return jnp.minimum(batch.first_changed[:, None] + jnp.arange(window)[None], last)


def both_directions(function: Callable[[jax.Array], Effects]) -> Effects:
    """Runs a function of the direction for each of `DIRECTIONS`, stacked on the axis after the pairs."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), jax.lax.map(function, jnp.arange(len(DIRECTIONS))))


def answer_effects(logits_BxQxV: jax.Array, batch: EncodedPairs) -> Effects:
    """Sums what a run answers at the affected reads of each pair, [B] each, as `read_effects` finds it."""
    return over_reads(read_effects(logits_BxQxV, batch))


def over_reads(at_reads: Effects) -> Effects:
    """Sums effects over the reads of each pair, [B, Q] to [B]."""
    return {name: jnp.sum(x, axis=-1) for name, x in at_reads.items()}


def read_effects(logits_BxQxV: jax.Array, batch: EncodedPairs | StreamReads) -> Effects:
    """Measures what a run answers at each affected read, [B, Q] each; 0 at others.

    Each of `METRICS`; `clean_correct`, `corrupted_correct`: whether the argmax over the vocabulary is the one answer or
    the other.
    """

    def logit(tokens_BxQ: jax.Array) -> jax.Array:
        return jnp.take_along_axis(logits_BxQxV, jnp.asarray(tokens_BxQ)[..., None], axis=-1)[..., 0]

    clean = logit(batch.clean_answers)
    per_read = {
        "logit_difference": clean - logit(batch.corrupted_answers),
        "answer_loss": jax.nn.logsumexp(logits_BxQxV, axis=-1) - clean,
        "answer_logit": clean,
        "clean_correct": answer_correct(logits_BxQxV, batch.clean_answers).astype(jnp.float32),
        "corrupted_correct": answer_correct(logits_BxQxV, batch.corrupted_answers).astype(jnp.float32),
    }
    return {name: jnp.where(batch.is_affected, x, 0.0) for name, x in per_read.items()}


def effects_under(
    params: Params,
    config: DecoderConfig,
    runs: PairRuns,
    edits: Interventions,
    layer: jax.Array | int,
    *,
    windowed: bool = True,
) -> Effects:
    """Measures edits of the base run, restarted in `layer`; if `windowed`, inside the window alone."""
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
    """Adds the effects of the two runs without intervention: `<name>_base`, `<name>_source`."""
    effects = effects | {f"{name}_base": x for name, x in runs.base_effects.items()}
    return effects | {f"{name}_source": x for name, x in runs.source_effects.items()}
