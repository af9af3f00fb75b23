"""Times activation patching, path patching and neuron ablation at one checkpoint, against plain implementations.

    python -m benchmarks.interventions --run_dir=… --benchmark_dir=… --probe_set=…

Activation patching: every residual stage at every position, against TransformerLens' own `patching` (extra `peers`) on
the same pairs and cores. Path patching: every direct path, against a loop that runs the whole model for each. Neurons:
each alone, on records of the probe set. The results of both sides are compared.

By default it takes 32 pairs and 64 records, and some minutes on 2 cores. `--pairs=96 --records=384` takes all, and
three to four times as long.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from kvjax.converters.convert import convert_checkpoint
from kvjax.converters.to_torch import to_torch

from benchmarks.flops import activation_patching_flops, path_patching_flops
from benchmarks.reporting import machine, median_seconds, torch_device, write_result
from kvjax.artifacts.run_dir import RunDir
from kvjax.devices import share_cpu_cores
from kvjax.execution.memory_plan import CPU_TOKENS_PER_BATCH as RECORD_TOKENS_PER_BATCH
from kvjax.execution.over_pairs import OverPairs, PairBatch
from kvjax.intervene.inputs import CPU_TOKENS_PER_BATCH
from kvjax.intervene.kinds.activation_patching import patching_effects
from kvjax.intervene.kinds.neurons import neuron_sums
from kvjax.intervene.kinds.path_patching import path_effects
from kvjax.intervene.pair_runs import DENOISING, Effects, PairRuns, answer_effects, run_pairs
from kvjax.intervene.paths import all_edges, all_senders, run_changes, sender_changes
from kvjax.intervene.places import Place, stage_places
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.interventions import Edit, Interventions
from kvjax.model.params import Params
from kvjax.model.restart import before_layer
from kvjax.model.sites import take_positions
from kvjax.model.transforms import plain_forward
from kvjax.task.benchmark import Benchmark
from kvjax.task.encoding import EncodedRecords, bucket_by_length, encode_records
from kvjax.task.pair_encoding import EncodedPairs, encode_pairs
from kvjax.task.pairs import own_pairs
from kvjax.task.probe_set import open_probe_set

FLAGS = flags.FLAGS
flags.DEFINE_string("run_dir", None, "The run whose last checkpoint is intervened in.", required=True)
flags.DEFINE_string("benchmark_dir", None, "The run's benchmark.", required=True)
flags.DEFINE_string("probe_set", None, "The probe set to make pairs from.", required=True)
flags.DEFINE_integer("pairs", 32, "Pairs that are patched, the first of kind value.", lower_bound=8)
flags.DEFINE_integer("records", 64, "Records of the probe set that neurons are ablated on.", lower_bound=1)
flags.DEFINE_integer("repeats", 3, "Timed calls; the median is reported.", lower_bound=1)
flags.DEFINE_bool("neurons", True, "Time the neurons too.")
HAS_TRANSFORMER_LENS = importlib.util.find_spec("transformer_lens") is not None


def main(argv: list[str]) -> None:
    del argv
    share_cpu_cores()
    with tempfile.TemporaryDirectory() as scratch:
        run, benchmark, encoded, records, params, config = _inputs(Path(scratch))
    devices = jax.local_device_count()
    together = jax.tree.map(lambda x: np.stack([x] * devices), params)
    alone = jax.tree.map(lambda x: x[None], params)
    on_cpu = jax.default_backend() == "cpu"
    pair_tokens = CPU_TOKENS_PER_BATCH if on_cpu else encoded.clean_tokens.size
    program = OverPairs(encoded, tokens_per_batch=pair_tokens, devices=devices)
    result = {
        "what": "interventions at one checkpoint, seconds",
        "machine": machine(),
        "model": run.config.model.model_dump(),
        "pairs": len(encoded),
    }
    places = stage_places(config.n_layers)
    measures = {
        "activation_patching": functools.partial(_patch, config, tuple(places.values())),
        "path_patching": functools.partial(_paths, config),
    }
    found = {}
    for name in measures:
        found[name] = program.run(measures[name], alone)  # compiles
        program.run(measures[name], together)
        result[name] = {
            "one_checkpoint": median_seconds(lambda n=name: program.run(measures[n], alone), FLAGS.repeats),
            "each_of_several": median_seconds(lambda n=name: program.run(measures[n], together), FLAGS.repeats)
            / devices,
        }
    peak = result["machine"]["matmul_2048_float32_gflops"] * 1e9
    flops = {
        "activation_patching": activation_patching_flops(config, encoded, directions=1, components=False),
        "path_patching": path_patching_flops(config, encoded, directions=1),
    }
    for name, operations in flops.items():
        floor = operations / peak
        result[name] |= {"floor": floor, "share_of_matmul_rate": floor / result[name]["each_of_several"]}
    loop = functools.partial(_plain_paths, config)
    plain = program.run(loop, alone)
    result["path_patching"]["plain_loop"] = median_seconds(lambda: program.run(loop, alone), 1)
    gap = np.abs(plain["logit_difference"] - found["path_patching"]["logit_difference"]).max()
    result["path_patching"] |= {
        "paths": len(all_edges(config.n_layers, config.n_heads)),
        "ratio": result["path_patching"]["plain_loop"] / result["path_patching"]["one_checkpoint"],
        "largest_difference_in_logits": float(gap),
    }
    if HAS_TRANSFORMER_LENS and torch_device() is not None:
        result["activation_patching"] |= _transformer_lens(run, params, encoded, found["activation_patching"], places)
        ratio = result["activation_patching"]["transformer_lens"] / result["activation_patching"]["one_checkpoint"]
        result["activation_patching"]["ratio"] = ratio
    if FLAGS.neurons:
        result["neurons"] = _time_neurons(config, benchmark.vocabulary.value_ids, together, records, devices)
    print(result)
    print(write_result("interventions", result))


def _inputs(scratch: Path) -> tuple[RunDir, Benchmark, EncodedPairs, EncodedRecords, Params, DecoderConfig]:
    run = RunDir.open(Path(FLAGS.run_dir))
    benchmark = Benchmark.open(run.benchmark_dir(FLAGS.benchmark_dir))
    given = Path(FLAGS.probe_set)
    for path in given.parent.glob(f"{given.stem}.*"):
        shutil.copy(path, scratch / path.name)
    probe = open_probe_set(scratch / given.name, benchmark)
    longest = run.config.model.max_seq_len
    of_kind = own_pairs(probe, benchmark).of_kind("value")[: FLAGS.pairs]
    pairs = encode_pairs(of_kind, benchmark.vocabulary, max_seq_len=longest)
    # The peers' metric is of one read: the one that the pair was made for.
    pairs = dataclasses.replace(pairs, is_affected=pairs.is_target)
    chosen = np.linspace(0, len(probe.records), min(FLAGS.records, len(probe.records)), endpoint=False).astype(int)
    own_records = [probe.records[index] for index in chosen]
    records = encode_records(own_records, benchmark.vocabulary, probe.manifest.splits, max_seq_len=longest)
    step, path = list(run.checkpoints.items())[-1]
    params = convert_checkpoint(path, run.config, benchmark, expected_step=step).params
    config = DecoderConfig.from_model_config(run.config.model, len(benchmark.vocabulary.tokens))
    return run, benchmark, pairs, records, params, config


def _patch(config: DecoderConfig, places: tuple[Place, ...], params: Params, batch: PairBatch) -> Effects:
    runs = run_pairs(params, config, batch.pairs, DENOISING, window=batch.window)
    return patching_effects(params, config, runs, places, batch.several)


def _paths(config: DecoderConfig, params: Params, batch: PairBatch) -> Effects:
    return path_effects(params, config, run_pairs(params, config, batch.pairs, DENOISING, window=batch.window))


def path_edits(
    runs: PairRuns, config: DecoderConfig, site: str, layer: jax.Array | int, head: jax.Array | int, change: jax.Array
) -> Interventions:
    """Makes the edit that adds a change [B, T, D] to a receiver's input in the base run."""
    one_layer = jnp.arange(config.n_layers) == layer
    if site == "logits_input":
        return {site: Edit(jnp.ones((1, 1, 1), bool), runs.base.trace["post_mlp"][-1] + change)}
    if site == "mlp_input":
        post_attn = jax.lax.dynamic_index_in_dim(runs.base.trace["post_attn"], layer, 0, keepdims=False)
        return {site: Edit(one_layer[:, None, None, None], (post_attn + change)[None])}
    mask = one_layer[:, None, None, None, None] & (jnp.arange(config.n_heads) == head)[None, None, None, :, None]
    value = before_layer(runs.base.trace, layer) + change
    return {site: Edit(mask, value[None, :, :, None, :])}


def _plain_paths(config: DecoderConfig, params: Params, batch: PairBatch) -> Effects:
    """Patches every path by the whole model, one after another in a compiled loop, keeping only the two runs."""
    runs: PairRuns = run_pairs(params, config, batch.pairs, DENOISING, window=batch.window)
    changes = sender_changes(params, config, run_changes(runs))
    senders = all_senders(config.n_layers, config.n_heads)
    edges = all_edges(config.n_layers, config.n_heads)
    found = {}
    for site in dict.fromkeys(edge.receiver.site for edge in edges):
        own = [edge for edge in edges if edge.receiver.site == site]
        rows = [(edge.receiver.layer, edge.receiver.head, senders.index(edge.sender)) for edge in own]

        def one(row: tuple, site: str = site):
            layer, head, sender = row
            edits = path_edits(runs, config, site, layer, head, changes[sender])
            logits, _ = plain_forward(config)(params, runs.base.tokens, edits=edits)
            read = take_positions(logits, batch.pairs.prediction_positions, 1)
            return answer_effects(read, batch.pairs)["logit_difference"]

        each = jax.lax.map(one, tuple(jnp.array(column) for column in zip(*rows, strict=True)))
        found |= dict(zip(own, each, strict=True))
    return {"logit_difference": jnp.stack([found[edge] for edge in edges], axis=-1)}


def _transformer_lens(run, params, encoded, ours, places) -> dict[str, float]:
    from benchmarks.peers.transformer_lens import hooked_transformer, library_patch_means, patch_arrays

    state = {name: tensor.to(torch_device()) for name, tensor in to_torch(params).items()}
    model = hooked_transformer(run.config.model, state)
    rows = np.arange(len(encoded))
    target = encoded.is_target.argmax(axis=1)
    arguments = (
        encoded.clean_tokens,
        encoded.corrupted_tokens,
        encoded.prediction_positions[rows, target],
        encoded.clean_answers[rows, target],
        encoded.corrupted_answers[rows, target],
    )
    library_patch_means(model, *(x[:4] for x in arguments))  # warm-up
    seconds = median_seconds(lambda: library_patch_means(model, *arguments), 1)
    few = slice(0, 8)
    theirs = patch_arrays(model, *(x[few] for x in arguments), sites=("resid_mid",))["resid_mid"]
    gap = 0.0
    for layer in range(len(theirs)):
        stage = list(places).index(f"layer_{layer}_post_attn")
        for n in range(8):
            first, last = int(encoded.first_changed[n]), int(encoded.last_affected[n])
            mine = ours["logit_difference"][0, n, stage, : last - first + 1]
            gap = max(gap, float(np.abs(mine - theirs[layer, first : last + 1, n]).max()))
    return {"transformer_lens": seconds, "largest_difference_in_logits": gap}


def _time_neurons(config, value_ids, stacked, records, devices) -> dict[str, float]:
    on_cpu = jax.default_backend() == "cpu"
    buckets = bucket_by_length(records, tokens_per_batch=RECORD_TOKENS_PER_BATCH if on_cpu else records.tokens.size)

    def run() -> list:
        ids = tuple(value_ids.tolist())
        return [neuron_sums(config, b.horizon, ids, devices, stacked, b.batches) for b in buckets]

    jax.block_until_ready(run())  # compiles
    seconds = median_seconds(run, 1)
    return {"neurons": config.n_layers * config.d_ff, "records": len(records), "each_of_several": seconds / devices}


if __name__ == "__main__":
    app.run(main)
