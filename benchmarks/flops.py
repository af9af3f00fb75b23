"""Counts the arithmetic that a sweep cannot avoid: products over real tokens, no padding, no elementwise work."""

from __future__ import annotations

import numpy as np

from kvjax.model.decoder import DecoderConfig
from kvjax.task.encoding import EncodedRecords


def zero_ablation_flops(config: DecoderConfig, encoded: EncodedRecords) -> float:
    """Counts the operations of the clean pass and of every head's and MLP's ablation, restarted as late as possible.

    Multiplications and additions count one each. An ablation in layer l computes again: a head's what its own change
    adds to the residual stream and the MLP's activations of l, and what the MLP makes of these; and either's all later
    layers, the last at the reads alone: with keys and values at every position, or with the attended inputs of H rows
    per read, whichever is less.
    """
    width, hidden, layers = config.d_model, config.d_ff, config.n_layers
    lengths = encoded.lengths.astype(np.float64)
    tokens, reads = lengths.sum(), float(encoded.is_read.sum())
    pairs = (lengths * (lengths + 1) / 2).sum()  # (query, key) pairs that causality allows
    read_pairs = float((encoded.prediction_positions + 1)[encoded.is_read].sum())
    projection, mlp = 2 * width * width, 4 * width * hidden
    head_change = 2 * config.d_head * (width + hidden) + 2 * hidden * width
    layer = tokens * (4 * projection + mlp) + 4 * width * pairs
    with_keys = tokens * 2 * projection + 4 * width * read_pairs
    without_keys = reads * 2 * projection + 4 * width * config.n_heads * read_pairs
    last_layer = min(with_keys, without_keys) + reads * (2 * projection + mlp)
    unembedding = 2 * width * config.vocab_size
    total = layers * layer + tokens * unembedding
    for index in range(layers):
        later = (layers - 2 - index) * layer + last_layer if index < layers - 1 else 0.0
        here = reads if index == layers - 1 else tokens
        total += config.n_heads * (here * head_change + later + reads * unembedding)
        total += later + reads * unembedding
    return float(total)
