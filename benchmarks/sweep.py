"""Seconds per checkpoint of the sweep, against eager PyTorch in the same process on the same cores.

    python -m benchmarks.sweep                                   # random weights on a freshly drawn benchmark
    python -m benchmarks.sweep --run_dir=… --benchmark_dir=… --probe_set=…

Both sides run the clean pass and every head and MLP ablation on the whole probe set; kvjax also forms everything else
of its rows (logit lens, attention, write norms, drift). Their right answers are compared, so that neither is fast by
being wrong.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from absl import app, flags

from benchmarks.peers.torch_eager import TorchAblations
from benchmarks.reporting import machine, median_seconds, write_result
from converters.source import convert_checkpoint
from converters.to_torch import to_torch
from converters.torch_decoder import TorchDecoder
from kvjax.artifacts.run_dir import RunDir
from kvjax.config import BenchmarkConfig, ModelConfig, find_config, read_config
from kvjax.model.decoder import Decoder, DecoderConfig, Params
from kvjax.sweep.stream import ProbeProgram, SweepSettings
from kvjax.task.benchmark import Benchmark, generate_benchmark
from kvjax.task.encoding import EncodedRecords, encode_records
from kvjax.task.probe_set import generate_probe_set, open_probe_set
from kvjax.task.vocabulary import Vocabulary

FLAGS = flags.FLAGS
flags.DEFINE_string("run_dir", None, "Run whose last checkpoint is measured; random weights where none is given.")
flags.DEFINE_string("benchmark_dir", None, "The run's benchmark.")
flags.DEFINE_string("probe_set", None, "The probe set to measure on.")
flags.DEFINE_integer("repeats", 5, "Timed calls of kvjax; the median is reported.", lower_bound=1)
flags.DEFINE_integer("torch_repeats", 2, "Timed calls of PyTorch.", lower_bound=1)
flags.DEFINE_list("torch_batches", ["384", "64", "16"], "Sequences per PyTorch forward; the fastest is the peer.")
HAS_TRANSFORMER_LENS = importlib.util.find_spec("transformer_lens") is not None
flags.DEFINE_bool("transformer_lens", HAS_TRANSFORMER_LENS, "Time TransformerLens too (by default where installed).")
flags.register_validator(
    "transformer_lens", lambda on: HAS_TRANSFORMER_LENS or not on, "install it with `pip install -e '.[peers]'`"
)
flags.DEFINE_string("name", "sweep", "Name of the result file.")

REFERENCE_MODEL = {"d_model": 128, "n_layers": 3, "n_heads": 4, "d_ff": 512, "max_seq_len": 96}


def main(argv: list[str]) -> None:
    del argv
    with tempfile.TemporaryDirectory() as scratch:
        vocabulary, encoded, num_splits, model, params, weights, reading = _inputs(Path(scratch))
    vocab_size = len(vocabulary.tokens)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    module = TorchDecoder(model, vocab_size)
    module.load_state_dict(to_torch(params))
    config = DecoderConfig.from_model_config(model, vocab_size)

    program = ProbeProgram(config, vocabulary, encoded, num_splits, SweepSettings(checkpoint_batch="1"))
    start = time.perf_counter()
    (measured,) = program.measure([params])
    first = time.perf_counter() - start
    seconds = median_seconds(lambda: program.measure([params]), FLAGS.repeats)

    peers = {}
    for batch in map(int, FLAGS.torch_batches):
        peer = TorchAblations(module, encoded, vocabulary.value_ids, batch)
        theirs = peer.measure()  # also the warm-up
        peers[str(batch)] = median_seconds(peer.measure, FLAGS.torch_repeats)
    best = min(peers.values())
    lens = _transformer_lens(model, module, encoded, vocabulary, measured) if FLAGS.transformer_lens else None
    result = {
        "what": "clean pass, every head and MLP zero ablation, all measures of a row; one checkpoint",
        "machine": machine(),
        "model": model.model_dump(),
        "records": len(encoded),
        "tokens": int(encoded.lengths.sum()),
        "weights": weights,
        "kvjax_seconds_per_checkpoint": seconds,
        "kvjax_compile_seconds": first - seconds,
        "read_convert_certify_seconds": reading,
        "torch_seconds_per_checkpoint_by_batch": peers,
        "ratio_to_fastest_torch": best / seconds,
        "transformer_lens": lens,
        "transformer_lens_note": None if lens else "not timed: not installed, or switched off",
        "differing_answers": _differing_answers(measured, theirs),
        "answers_compared": int(encoded.is_read.sum()) * len(theirs),
    }
    path = write_result(FLAGS.name, result)
    print(f"kvjax    {seconds:8.3f} s per checkpoint (compile {first - seconds:.1f} s, once)")
    for batch, peer_seconds in peers.items():
        print(f"PyTorch  {peer_seconds:8.3f} s per checkpoint, batches of {batch} ({peer_seconds / seconds:.1f}x)")
    for batch, lens_seconds in (lens["seconds_per_checkpoint_by_batch"] if lens else {}).items():
        ratio = lens_seconds / seconds
        print(f"TransformerLens {lens_seconds:.3f} s per checkpoint, batches of {batch} ({ratio:.1f}x)")
    if lens is None:
        print(f"TransformerLens {result['transformer_lens_note']}")
    if reading is not None:
        print(f"reading, converting and certifying one file: {reading:.3f} s")
    print(f"answers that differ: {result['differing_answers']} of {result['answers_compared']}")
    print(path)


def _inputs(scratch: Path) -> tuple[Vocabulary, EncodedRecords, int, ModelConfig, Params, str, float | None]:
    """Returns vocabulary, records, number of splits, model, parameters, whose they are, and seconds to read a file."""
    if FLAGS.run_dir:
        run = RunDir.open(Path(FLAGS.run_dir))
        benchmark = Benchmark.open(run.benchmark_dir(FLAGS.benchmark_dir))
        probe = open_probe_set(Path(FLAGS.probe_set or run.analysis / "probe_set.jsonl"), benchmark)
        model = run.config.model
    else:
        settings = read_config(find_config("symbolic_kv_base", "benchmark"), BenchmarkConfig)
        generate_benchmark(settings, scratch / "benchmark", overwrite=False)
        benchmark = Benchmark.open(scratch / "benchmark")
        probe = generate_probe_set(
            benchmark, scratch / "probe_set.jsonl", examples_per_split=96, fit_examples=512, seed=17
        )
        model = ModelConfig.model_validate(REFERENCE_MODEL)
    splits = probe.manifest.splits
    encoded = encode_records(probe.records, benchmark.vocabulary, splits, max_seq_len=model.max_seq_len)
    if FLAGS.run_dir:
        files = list(run.checkpoints.items())

        def read(index: int):
            step, path = files[index]
            return convert_checkpoint(path, run.config, benchmark, expected_step=step, certify_on=encoded.tokens[::24])

        params = read(-1).params  # compiles the certificate
        weights = f"{run.config.run_name}, step {files[-1][0]}"
        reading = median_seconds(lambda: read(-1).params, FLAGS.repeats)
    else:
        config = DecoderConfig.from_model_config(model, len(benchmark.vocabulary.tokens))
        variables = Decoder(config).init(jax.random.key(0), np.ones((1, 4), np.int32))
        params, reading = jax.tree.map(np.asarray, variables["params"]), None
        weights = "random"
    return benchmark.vocabulary, encoded, len(splits), model, params, weights, reading


def _transformer_lens(
    model: ModelConfig,
    module: TorchDecoder,
    encoded: EncodedRecords,
    vocabulary: Vocabulary,
    ours: dict[str, np.ndarray],
) -> dict[str, Any]:
    """Returns TransformerLens's version, its seconds per checkpoint by batch size, and how its answers differ."""
    from benchmarks.peers.transformer_lens import TransformerLensAblations, hooked_transformer

    hooked = hooked_transformer(model, module.state_dict())
    seconds = {}
    for batch in map(int, FLAGS.torch_batches):
        peer = TransformerLensAblations(hooked, encoded, vocabulary.value_ids, batch)
        theirs = peer.measure()  # also the warm-up
        seconds[str(batch)] = median_seconds(peer.measure, FLAGS.torch_repeats)
    return {
        "version": importlib.metadata.version("transformer-lens"),
        "seconds_per_checkpoint_by_batch": seconds,
        "differing_answers": _differing_answers(ours, theirs),
    }


def _differing_answers(ours: dict[str, np.ndarray], theirs: dict[tuple[int, ...], tuple[np.ndarray, ...]]) -> int:
    """Returns the number of answers the two sides count differently, summed over sequences and ablations."""
    different = 0
    for component, (correct, _) in theirs.items():
        match component:
            case ():
                mine = ours["read/correct"].sum(axis=1)
            case (layer,):
                mine = ours["mlp/zero/correct"][:, layer]
            case (layer, head):
                mine = ours["head/zero/correct"][:, layer, head]
        different += int(np.abs(mine - correct).sum())
    return different


if __name__ == "__main__":
    app.run(main)
