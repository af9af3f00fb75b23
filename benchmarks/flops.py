"""Counts the arithmetic that sweeps and interventions cannot avoid: products over real tokens, without padding.

    python -m benchmarks.flops --run_dir=… --benchmark_dir=… --probe_set=… --beside=intervene_beside_cpu_2cores

It prints, for each kind of intervention, the operations, the seconds that they would take at the rate of a large
product (the floor), and the share of that rate that the second checkout's warm calls of a result of
`benchmarks.intervene_beside` reached. Necessity is counted for the sets that `kvjax intervene` measured in the run.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from benchmarks.reporting import RESULTS, matmul_gflops
from kvjax.artifacts.files import read_json
from kvjax.artifacts.results import Intervention, RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.devices import share_cpu_cores
from kvjax.intervene.ablations import measured_ablations
from kvjax.intervene.kinds.attribution_patching import INTEGRATION_STEPS
from kvjax.intervene.kinds.component_sets import sets_to_ablate
from kvjax.intervene.kinds.subspaces import OPERATIONS, SUBSPACES, usable_ranks
from kvjax.intervene.paths import all_edges
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.set_ablation import SetTree
from kvjax.task.benchmark import Benchmark
from kvjax.task.corruption import PAIR_KINDS
from kvjax.task.encoding import EncodedRecords
from kvjax.task.pair_encoding import EncodedPairs, encode_clean_streams, encode_pairs
from kvjax.task.pairs import own_pairs
from kvjax.task.probe_set import open_probe_set
from kvjax.task.stream_reads import StreamReads

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of the command; other benchmarks import the counts, and have flags of these names."""
    flags.DEFINE_string("run_dir", None, "The run.", required=True)
    flags.DEFINE_string("benchmark_dir", None, "The run's benchmark.", required=True)
    flags.DEFINE_string("probe_set", None, "The probe set that pairs are made from.", required=True)
    flags.DEFINE_string("steps", "3000,4000,6000", "Checkpoints.")
    flags.DEFINE_integer("pairs_per_kind", 96, "Pairs of each kind.", lower_bound=1)
    flags.DEFINE_string("beside", None, "Name of a result of benchmarks.intervene_beside, without .json.")


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


def attribution_flops(config: DecoderConfig, pairs: EncodedPairs) -> float:
    """Counts the operations of scoring every node and path to first order, by gradients at five points, denoising.

    Both runs, as `activation_patching_flops` counts them; and at each point a pass inside the window forwards and one
    backwards, which takes as many operations, for no weight is differentiated. The last layer makes keys and values at
    every position and the rest at the reads alone. A score is one product with what its sender changes.
    """
    positions = (pairs.last_affected - pairs.first_changed + 1.0).sum()
    reads = float(pairs.is_affected.sum())
    projection, mlp, _ = _products(config)
    width, layers, heads = config.d_model, config.n_layers, config.n_heads
    read_out = 2 * width * config.vocab_size
    forward = (layers - 1) * positions * (4 * projection + mlp)
    forward += positions * 2 * projection + reads * (2 * projection + mlp + read_out)
    scores = 0.0
    for edge in all_edges(layers, heads):
        in_last = edge.receiver.layer == layers - 1 and edge.receiver.site in ("query_input", "mlp_input")
        scores += 2 * width * (reads if in_last or edge.receiver.site == "logits_input" else positions)
    sent = layers * heads * positions * 2 * config.d_head * width
    return float(_run_flops(config, pairs) + sent + (1 + INTEGRATION_STEPS) * (2 * forward + scores))


def set_ablation_flops(config: DecoderConfig, rows: StreamReads, sets_by_ablation: Sequence[np.ndarray]) -> float:
    """Counts the operations of ablating sets of components in clean streams.

    The clean run once; and in each layer the states that differ between sets, as `SetTree` finds them: attention
    unless it gets the clean run's state or all heads are ablated, and the MLP unless it is ablated. The last layer is
    counted at the reads alone, with keys and values or without, whichever is less. Attention's own products are left
    out before it.

    Args:
      config: the model's shape.
      rows: the streams, each with its reads.
      sets_by_ablation: for each kind of ablation, bool [K, components in forward order].
    """
    layers, projection, mlp, _ = config.n_layers, *_products(config)
    tokens, reads = float((rows.tokens != config.pad_id).sum()), float(rows.is_affected.sum())
    attended = float((rows.prediction_positions + 1.0)[rows.is_affected].sum())
    read_out = reads * 2 * config.d_model * config.vocab_size
    total = tokens * layers * (4 * projection + mlp) + read_out
    for sets_KxM in sets_by_ablation:
        sets = np.unique(sets_KxM[sets_KxM.any(axis=1)], axis=0).reshape(-1, layers, config.n_heads + 1)
        tree = SetTree.of(sets, len(sets))
        total += len(sets) * read_out
        for layer, count in enumerate(tree.counts_L):
            members, in_last = tree.members_LxKxM[layer, :count], layer == layers - 1
            attends = (tree.parents_LxK[layer, :count] > 0) & ~members[:, :-1].all(axis=1)
            attention = _last_attention(config, tokens, reads, attended) if in_last else tokens * 3 * projection
            here = reads if in_last else tokens
            total += count * here * projection + attends.sum() * attention + (~members[:, -1]).sum() * here * mlp
    return float(total)


def subspace_flops(config: DecoderConfig, pairs: EncodedPairs, ranks: Sequence[int]) -> float:
    """Counts the operations of editing every subspace of every stage, at prediction positions and at supports.

    Both runs; and for each stage, subspace, rank and operation what comes after it, from the first edited position on.
    Fitting the subspaces is left out, and attention's own products before the last layer.
    """
    reads = pairs.is_affected.sum(axis=1)
    total = 0.0
    for positions_NxQ in (pairs.prediction_positions, pairs.support_positions):
        first = np.where(pairs.is_affected, positions_NxQ, np.iinfo(np.int32).max).min(axis=1)
        edited = sum(len(np.unique(p[own])) for p, own in zip(positions_NxQ, pairs.is_affected, strict=True))
        stages = _after_stages(config, pairs, edited, pairs.last_affected - first + 1.0, reads)
        # Into the subspace and back, of each edited state.
        change = (2 * config.n_layers + 2) * edited * 4 * config.d_model
        total += len(SUBSPACES) * len(OPERATIONS) * (len(ranks) * stages + sum(ranks) * change)
    return float(_run_flops(config, pairs) + total)


def across_checkpoints_flops(config: DecoderConfig, pairs: EncodedPairs, checkpoints: int) -> float:
    """Counts the operations of taking another checkpoint's states at each stage, whole and at each role's positions.

    Each checkpoint's clean streams once, up to the last affected read; and for each two checkpoints, stage and set of
    positions what comes after the stage, from the first of these positions on. Attention's own products are left out
    before the last layer.
    """
    ends, reads = pairs.last_affected + 1.0, pairs.is_affected.sum(axis=1)
    total = _after_stages(config, pairs, ends.sum(), ends, reads)
    for role in range(int(pairs.roles.max()) + 1):
        has = pairs.roles == role
        some = has.any(axis=1)
        rows = np.where(some, ends - has.argmax(axis=1), 0)
        total += _after_stages(config, pairs, has.sum(), rows, np.where(some, reads, 0))
    projection, mlp, _ = _products(config)
    runs = checkpoints * ends.sum() * config.n_layers * (4 * projection + mlp)
    return float(runs + checkpoints * (checkpoints - 1) * total)


def _after_stages(
    config: DecoderConfig, pairs: EncodedPairs, replaced: float, rows_N: np.ndarray, reads_N: np.ndarray
) -> float:
    """Counts the operations after each residual stage if its states are replaced, summed over stages and pairs.

    Args:
      config: the model's shape.
      pairs: N pairs.
      replaced: how many states are replaced.
      rows_N: how many positions differ after them, of each pair.
      reads_N: how many are read.
    """
    rows, read = float(rows_N.sum()), float(reads_N.sum())
    keys = np.where(pairs.is_affected, pairs.prediction_positions + 1.0, 0).sum(axis=1)
    attended = float(np.where(reads_N > 0, keys, 0).sum())
    projection, mlp, _ = _products(config)
    block, read_out = 4 * projection + mlp, read * 2 * config.d_model * config.vocab_size
    last = _last_attention(config, rows, read, attended) + read * (projection + mlp) + read_out

    def before_layer(layer: int) -> float:
        return (config.n_layers - 1 - layer) * block * rows + last

    total = before_layer(0) + read_out  # the embedding; the last stage is read out
    for layer in range(config.n_layers):
        is_last = layer == config.n_layers - 1
        total += 2 * read_out + read * mlp if is_last else 2 * before_layer(layer + 1) + replaced * mlp
    return total


def _last_attention(config: DecoderConfig, rows: float, reads: float, attended: float) -> float:
    """Counts the last layer's attention at reads before its output projection, with keys and values or without.

    Args:
      config: the model's shape.
      rows: positions whose keys and values would be made.
      reads: the reads.
      attended: keys that they attend to.
    """
    width, projection = config.d_model, 2 * config.d_model**2
    with_keys = (reads + 2 * rows) * projection + 4 * width * attended
    without_keys = 3 * reads * projection + 4 * width * config.n_heads * attended
    return min(with_keys, without_keys)


def _products(config: DecoderConfig) -> tuple[float, float, float]:
    """Counts the operations at one position of a projection, an MLP, and what one head's change adds."""
    width, hidden = config.d_model, config.d_ff
    return 2 * width**2, 4 * width * hidden, 2 * config.d_head * (width + hidden) + 2 * hidden * width


def _run_flops(config: DecoderConfig, pairs: EncodedPairs) -> float:
    """Counts the operations of both runs of pairs; they are equal before the first changed token."""
    projection, mlp, _ = _products(config)
    positions = (2 * pairs.last_affected - pairs.first_changed + 2.0).sum()
    return positions * config.n_layers * (4 * projection + mlp)


def main(argv: list[str]) -> None:
    del argv
    share_cpu_cores()
    run = RunDir.open(Path(FLAGS.run_dir))
    benchmark = Benchmark.open(run.benchmark_dir(FLAGS.benchmark_dir))
    with tempfile.TemporaryDirectory() as scratch:  # pairs are written beside their probe set
        given = Path(FLAGS.probe_set)
        for path in given.parent.glob(f"{given.stem}.*"):
            shutil.copy(path, Path(scratch) / path.name)
        pair_set = own_pairs(open_probe_set(Path(scratch) / given.name, benchmark), benchmark)
    pairs = tuple(pair for kind in PAIR_KINDS for pair in pair_set.of_kind(kind)[: FLAGS.pairs_per_kind])
    longest, vocabulary = run.config.model.max_seq_len, benchmark.vocabulary
    encoded = encode_pairs(pairs, vocabulary, max_seq_len=longest)
    config = DecoderConfig.from_model_config(run.config.model, len(vocabulary.tokens))
    steps = run.select_steps(FLAGS.steps)
    ranks = usable_ranks(config.d_model, len(vocabulary.value_tokens))
    counted = {
        "activation_patching": len(steps) * activation_patching_flops(config, encoded),
        "path_patching": len(steps) * path_patching_flops(config, encoded),
        "subspaces": len(steps) * subspace_flops(config, encoded, ranks),
        "attribution": len(steps) * attribution_flops(config, encoded),
    }
    if len(steps) > 1:
        counted["across_checkpoints"] = across_checkpoints_flops(config, encoded, len(steps))
    rows = StreamReads.of(encoded, *encode_clean_streams(pairs, vocabulary, max_seq_len=longest))
    by_step = measured_sets(run)
    if all(step in by_step for step in steps):
        counted["necessity"] = sum(set_ablation_flops(config, rows, by_step[step]) for step in steps)
    print_table(counted, len(encoded), steps)


def measured_sets(run: RunDir) -> dict[int, list[np.ndarray]]:
    """Reads which sets `kvjax intervene` ablated at each step of a run, by kind of ablation, bool [K, components]."""
    found = {}
    for path in RunResults(run).intervention_files("necessity"):
        dataset = Intervention.open(path).dataset
        names, rank_by = dataset["component"].values.tolist(), dataset.attrs["ranked_by"]
        for step in dataset["step"].values.tolist():
            own = dataset.sel(step=step)
            ranking = np.array([names.index(name) for name in own["ranking"].values])
            sets = np.concatenate(list(sets_to_ablate(ranking, own["in_named_set"].values.astype(bool)).values()))
            alone = np.eye(len(names), dtype=bool)
            kinds = measured_ablations(rank_by)
            found[step] = [np.concatenate([sets, alone]) if kind == rank_by else sets for kind in kinds]
    return found


def print_table(counted: Mapping[str, float], num_pairs: int, steps: Sequence[int]) -> None:
    """Prints operations, floor and, with the times of another benchmark, the share of the rate of a large product."""
    rate, warm = matmul_gflops(), None
    if FLAGS.beside is not None:
        result = read_json(RESULTS / f"{FLAGS.beside}.json")
        calls = [second["by_kind"] for _, second in result["calls"]["warm"]]
        warm = {kind: min(call[kind] for call in calls) for kind in calls[0]}
        rate = result["machine"]["matmul_2048_float32_gflops"]
    print(f"{num_pairs} pairs at steps {', '.join(map(str, steps))}; a large product: {rate:.0f} GFLOP/s")
    print(f"{'kind':<22}{'GFLOP':>8}{'floor, s':>10}" + (f"{'now, s':>8}{'share':>7}" if warm else ""))
    for kind, operations in counted.items():
        floor = operations / 1e9 / rate
        reached = f"{warm[kind]:8.1f}{floor / warm[kind]:7.2f}" if warm and kind in warm else ""
        print(f"{kind:<22}{operations / 1e9:8.0f}{floor:10.1f}{reached}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
