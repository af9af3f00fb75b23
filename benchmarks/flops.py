"""Counts the arithmetic that sweeps and interventions cannot avoid: products over real tokens, without padding."""

from __future__ import annotations

import numpy as np

from kvjax.model.decoder import DecoderConfig
from kvjax.task.encoding import EncodedRecords
from kvjax.task.pair_encoding import EncodedPairs


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


def activation_patching_flops(
    config: DecoderConfig, pairs: EncodedPairs, *, directions: int = 2, components: bool = True
) -> float:
    """Counts the operations of patching every stage, and components too, at every position, role and all positions.

    Both runs, the corrupted one from the first changed token on; the state that each place leads to, its queries, keys
    and values, at each position; and for each different set of positions what comes after them. The two halves of a
    stage lead to one state. Attention's own products are left out.
    """
    width, reads = pairs.last_affected - pairs.first_changed + 1.0, pairs.is_affected.sum(axis=1)
    sets, rows = width.copy(), width * (width + 1) / 2
    for role in range(1, int(pairs.roles.max()) + 1):
        has = pairs.roles == role
        several = has.sum(axis=1) > 1
        sets += several
        rows += np.where(several, pairs.last_affected - has.argmax(axis=1) + 1, 0)
    sets += width > 1
    rows += np.where(width > 1, width, 0)
    projection, mlp, head = _products(config)
    layers, heads = config.n_layers, config.n_heads if components else 0
    per_layer = heads + 2 if components else 1
    read_out = 2 * config.d_model * config.vocab_size
    positions, at_reads = width.sum(), (sets * reads).sum()
    total = 0.0
    for layer in range(layers):  # that a state enters
        states = 1 if layer == 0 else per_layer
        total += states * 3 * projection * positions
        if layer == layers - 1:
            total += states * at_reads * (projection + mlp + read_out)
        else:
            middle = (layers - 2 - layer) * (4 * projection + mlp)
            total += states * (rows.sum() * (projection + mlp + middle) + at_reads * (4 * projection + mlp + read_out))
    total += heads * ((layers - 1) * positions * head + reads.sum() * (head + read_out))
    return float(_run_flops(config, pairs) + directions * total)


def path_patching_flops(config: DecoderConfig, pairs: EncodedPairs, *, directions: int = 2) -> float:
    """Counts the operations of patching every direct path; as `activation_patching_flops` does."""
    positions = (pairs.last_affected - pairs.first_changed + 1.0).sum()
    reads = float(pairs.is_affected.sum())
    projection, mlp, head = _products(config)
    layers, heads = config.n_layers, config.n_heads
    read_out, block = 2 * config.d_model * config.vocab_size, 4 * projection + mlp
    total = layers * heads * positions * 2 * config.d_head * config.d_model  # what each head sends
    for layer in range(layers):
        senders, last = 1 + layer * (heads + 1), layer == layers - 1
        here = reads if last else positions
        total += senders * projection * (2 * positions + here)
        after = 0.0 if last else (layers - 2 - layer) * block * positions + block * reads
        total += 3 * heads * senders * (here * head + after + reads * read_out)
        total += (senders + heads) * (here * mlp + after + reads * read_out)
    total += (1 + layers * (heads + 1)) * reads * read_out
    return float(_run_flops(config, pairs) + directions * total)


def across_checkpoints_flops(config: DecoderConfig, pairs: EncodedPairs, checkpoints: int) -> float:
    """Counts the operations of taking another checkpoint's states at each stage, whole and at each role's positions.

    Each checkpoint's clean streams once, up to the last affected read; and for each two checkpoints, stage and set of
    positions what comes after the stage, from the first of these positions on. The last layer is counted at the reads
    alone, without making keys and values. Attention's own products are left out before it.
    """
    ends, reads = pairs.last_affected + 1.0, pairs.is_affected.sum(axis=1)
    attended = np.where(pairs.is_affected, pairs.prediction_positions + 1.0, 0).sum()  # keys of all reads
    # Of each pair and set: the positions replaced, those computed after them, and the reads.
    sets = [(ends, ends, reads)]
    for role in range(int(pairs.roles.max()) + 1):
        has = pairs.roles == role
        some = has.any(axis=1)
        sets.append((has.sum(axis=1), np.where(some, ends - has.argmax(axis=1), 0), np.where(some, reads, 0)))
    replaced, rows, read = (float(np.sum(column)) for column in zip(*sets, strict=True))
    attended *= read / reads.sum()
    projection, mlp, _ = _products(config)
    block, read_out = 4 * projection + mlp, 2 * config.d_model * config.vocab_size
    last = read * (4 * projection + mlp + read_out) + 4 * config.d_model * config.n_heads * attended

    def before_layer(layer: int) -> float:
        return (config.n_layers - 1 - layer) * block * rows + last

    total = before_layer(0) + read * read_out  # the embedding; the last stage is read out
    for layer in range(config.n_layers):
        is_last = layer == config.n_layers - 1
        total += 2 * read * read_out + read * mlp if is_last else 2 * before_layer(layer + 1) + replaced * mlp
    runs = checkpoints * ends.sum() * config.n_layers * block
    return float(runs + checkpoints * (checkpoints - 1) * total)


def _products(config: DecoderConfig) -> tuple[float, float, float]:
    """Counts the operations at one position of a projection, an MLP, and what one head's change adds."""
    width, hidden = config.d_model, config.d_ff
    return 2 * width**2, 4 * width * hidden, 2 * config.d_head * (width + hidden) + 2 * hidden * width


def _run_flops(config: DecoderConfig, pairs: EncodedPairs) -> float:
    """Counts the operations of both runs of pairs; they are equal before the first changed token."""
    projection, mlp, _ = _products(config)
    positions = (2 * pairs.last_affected - pairs.first_changed + 2.0).sum()
    return positions * config.n_layers * (4 * projection + mlp)
