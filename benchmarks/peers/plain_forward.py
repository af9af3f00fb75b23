"""Runs kvjax's plain forward pass for every ablation, on the same microbatches and devices as the sweep."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kvjax.measure.behaviour import answer_correct, answer_margin
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.interventions import CLEAN, Interventions, ablate_head, ablate_mlp
from kvjax.model.params import Params
from kvjax.model.sites import take_positions
from kvjax.model.transforms import over_checkpoints, over_interventions, plain_forward
from kvjax.sweeps.measure_checkpoint import SweepSpec
from kvjax.task.encoding import Bucket, EncodedRecords


class PlainAblations:
    """The clean pass and every head and MLP zero ablation of checkpoints, nothing restarted.

    Args:
      config: the checkpoints' shape.
      buckets: the sweep's microbatches.
      value_ids: token ids of the values.
      spec: the sweep's own, whose devices and lifts are taken.
    """

    def __init__(self, config: DecoderConfig, buckets: Sequence[Bucket], value_ids: jax.Array, spec: SweepSpec):
        apply, layers, heads = plain_forward(config), config.n_layers, config.n_heads

        def answers(params: Params, batch: EncodedRecords, edits: Interventions) -> tuple[jax.Array, jax.Array]:
            logits = take_positions(apply(params, batch.tokens, edits=edits)[0], batch.prediction_positions, 1)
            right, margin = answer_correct(logits, batch.answers), answer_margin(logits, batch.answers, value_ids)
            return jnp.sum(right & batch.is_read, axis=1), jnp.sum(jnp.where(batch.is_read, margin, 0.0), axis=1)

        def one_checkpoint(params: Params, all_batches: tuple[EncodedRecords, ...]):
            def one_batch(batch: EncodedRecords):
                def head(index: jax.Array):
                    edits = ablate_head(index // heads, index % heads, n_layers=layers, n_heads=heads)
                    return answers(params, batch, edits)

                def mlp(layer: jax.Array):
                    return answers(params, batch, ablate_mlp(layer, n_layers=layers))

                lifted = functools.partial(over_interventions, lift=spec.interventions)
                ablated = lifted(head)(jnp.arange(layers * heads)), lifted(mlp)(jnp.arange(layers))
                return answers(params, batch, CLEAN), *ablated

            return [jax.lax.map(one_batch, batches) for batches in all_batches]

        self._run = jax.jit(over_checkpoints(one_checkpoint, spec.placement))
        self._batches = tuple(bucket.batches for bucket in buckets)

    def measure(self, stacked_params: Params):
        """Sums right answers and margins of stacked checkpoints, on the devices."""
        return self._run(stacked_params, self._batches)
