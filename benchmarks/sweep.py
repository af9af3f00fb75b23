"""Times the sweep per checkpoint, against eager PyTorch in the same process on the same cores or GPU.

    python -m benchmarks.sweep                                   # random weights on a freshly drawn benchmark
    python -m benchmarks.sweep --run_dir=… --benchmark_dir=… --probe_set=…

Both sides run the clean pass and every head and MLP ablation on the whole probe set. kvjax also forms all other
measures of its rows (logit lens, attention, write norms, drift). Right answers are compared, so that neither side is
fast by being wrong.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from kvjax.converters.convert import convert_checkpoint
from kvjax.converters.to_torch import to_torch
from kvjax.converters.torch_decoder import TorchDecoder

from benchmarks.flops import zero_ablation_flops
from benchmarks.peers.plain_forward import PlainAblations
from benchmarks.peers.torch_eager import TorchAblations
from benchmarks.reporting import machine, median_seconds, torch_device, write_result
from kvjax.artifacts.run_dir import RunDir
from kvjax.config.benchmark import BenchmarkConfig
from kvjax.config.files import find_config, read_config
from kvjax.config.run import ModelConfig
from kvjax.devices import share_cpu_cores
from kvjax.model.decoder import Decoder
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params, stack_params
from kvjax.sweeps.compiled_sweep import CompiledSweep
from kvjax.sweeps.settings import SweepSettings
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
flags.DEFINE_string("checkpoint_batch", "auto", "Checkpoints per call, as in the sweep.")
flags.DEFINE_bool("complete", True, "Time complete rows (role-mean and resample ablation, probes) too.")
flags.DEFINE_string("name", "sweep", "Name of the result file.")

REFERENCE_MODEL = {"d_model": 128, "n_layers": 3, "n_heads": 4, "d_ff": 512, "max_seq_len": 96}


def main(argv: list[str]) -> None:
    del argv
    share_cpu_cores()
    with tempfile.TemporaryDirectory() as scratch:
        vocabulary, encoded, fit, num_splits, model, params, weights, reading = _inputs(Path(scratch))
    vocab_size = len(vocabulary.tokens)
    config = DecoderConfig.from_model_config(model, vocab_size)

    settings = SweepSettings(
        ablations=("zero",), probe="none", event_drift=False, checkpoint_batch=FLAGS.checkpoint_batch
    )
    program, seconds, compiling, measured = _time_sweep(config, vocabulary, encoded, num_splits, settings, params)
    plain = PlainAblations(config, program.buckets, vocabulary.value_ids, program.spec)
    stacked = stack_params([params] * program.chunk)
    jax.block_until_ready(plain.measure(stacked))
    plain_seconds = median_seconds(lambda: plain.measure(stacked), FLAGS.torch_repeats) / program.chunk
    clean = dataclasses.replace(settings, ablations=())
    _, clean_seconds, _, _ = _time_sweep(config, vocabulary, encoded, num_splits, clean, params)
    complete = None
    if FLAGS.complete:
        rows = dataclasses.replace(settings, ablations=SweepSettings().ablations, probe="ridge")
        _, complete_seconds, complete_compiling, _ = _time_sweep(
            config, vocabulary, encoded, num_splits, rows, params, fit
        )
        complete = {"seconds_per_checkpoint": complete_seconds, "compile_seconds": complete_compiling}
    flops, here = zero_ablation_flops(config, encoded), machine()
    peak = here["matmul_2048_float32_gflops"] * 1e9

    device, eager, lens = torch_device(), None, None
    if device is not None:
        module = TorchDecoder(model, vocab_size).to(device)
        module.load_state_dict(to_torch(params))
        eager = _peer(TorchAblations, module, encoded, vocabulary, measured)
        if FLAGS.transformer_lens:
            lens = _transformer_lens(model, module, encoded, vocabulary, measured)
    result = {
        "what": "clean pass and every head and MLP zero ablation, all clean measures; per checkpoint",
        "machine": here,
        "model": model.model_dump(),
        "records": len(encoded),
        "tokens": int(encoded.lengths.sum()),
        "weights": weights,
        "checkpoints_per_call": program.chunk,
        "devices": program.spec.placement.devices,
        "kvjax_seconds_per_checkpoint": seconds,
        "kvjax_compile_seconds": compiling,
        "kvjax_clean_pass_seconds": clean_seconds,
        "complete_rows": complete,
        "plain_forward_seconds_per_checkpoint": plain_seconds,
        "ratio_to_plain_forward": plain_seconds / seconds,
        "useful_gflop": flops / 1e9,
        "useful_share_of_matmul_rate": flops / seconds / peak,
        "read_convert_certify_seconds": reading,
        "torch": eager,
        "ratio_to_fastest_torch": eager and min(eager["seconds_per_checkpoint_by_batch"].values()) / seconds,
        "torch_note": None if eager else "not timed: this PyTorch has no device of the kind that kvjax ran on",
        "transformer_lens": lens,
        "transformer_lens_note": None if lens else "not timed: not installed, switched off, or without a device",
    }
    path = write_result(FLAGS.name, result)
    print(
        f"kvjax    {seconds:8.3f} s per checkpoint (compile {compiling:.1f} s, once), {clean_seconds:.3f} s of it clean"
    )
    share = result["useful_share_of_matmul_rate"]
    print(
        f"         {flops / 1e9:.0f} GFLOP of useful work: {share:.0%} of the matmul rate of {peak / 1e9:.0f} GFLOP/s"
    )
    if complete:
        print(f"         {complete['seconds_per_checkpoint']:.3f} s for complete rows")
    print(
        f"plain    {plain_seconds:8.3f} s per checkpoint, the whole model per ablation ({plain_seconds / seconds:.1f}x)"
    )
    for name, peer in (("PyTorch", eager), ("TransformerLens", lens)):
        for batch, peer_seconds in (peer["seconds_per_checkpoint_by_batch"] if peer else {}).items():
            ratio = peer_seconds / seconds
            print(f"{name} {peer_seconds:.3f} s per checkpoint, batches of {batch} ({ratio:.1f}x)")
        if peer:
            print(f"         answers that differ: {peer['differing_answers']} of {peer['answers_compared']}")
        else:
            print(f"{name} {result['torch_note' if name == 'PyTorch' else 'transformer_lens_note']}")
    if reading is not None:
        print(f"reading, converting and certifying one file: {reading:.3f} s")
    print(path)


def _time_sweep(
    config: DecoderConfig,
    vocabulary: Vocabulary,
    encoded: EncodedRecords,
    num_splits: int,
    settings: SweepSettings,
    params: Params,
    fit: EncodedRecords | None = None,
) -> tuple[CompiledSweep, float, float, dict[str, np.ndarray]]:
    """Times the program: the program, seconds per checkpoint, seconds of compiling, and the measured sums."""
    program = CompiledSweep(config, vocabulary, encoded, num_splits, settings, fit=fit)
    chunk = [params] * program.chunk
    start = time.perf_counter()
    measured = program.measure(chunk)[0]
    first = time.perf_counter() - start
    seconds = median_seconds(lambda: program.measure(chunk), FLAGS.repeats)
    return program, seconds / program.chunk, first - seconds, measured


def _inputs(
    scratch: Path,
) -> tuple[Vocabulary, EncodedRecords, EncodedRecords, int, ModelConfig, Params, str, float | None]:
    """Prepares vocabulary, records, fit set, number of splits, model, parameters, their name, seconds per file."""
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
    fit = encode_records(probe.fit_records, benchmark.vocabulary, ["train"], max_seq_len=model.max_seq_len)
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
    return benchmark.vocabulary, encoded, fit, len(splits), model, params, weights, reading


def _peer(
    ablations: Callable[..., Any],
    model: Any,
    encoded: EncodedRecords,
    vocabulary: Vocabulary,
    ours: dict[str, np.ndarray],
) -> dict[str, Any]:
    """Times a peer per checkpoint by batch size, and counts how its answers differ from ours."""
    seconds = {}
    for batch in map(int, FLAGS.torch_batches):
        peer = ablations(model, encoded, vocabulary.value_ids, batch)
        theirs = peer.measure()  # also the warm-up
        seconds[str(batch)] = median_seconds(peer.measure, FLAGS.torch_repeats)
    return {
        "seconds_per_checkpoint_by_batch": seconds,
        "differing_answers": _differing_answers(ours, theirs),
        "answers_compared": int(encoded.is_read.sum()) * len(theirs),
    }


def _transformer_lens(
    model: ModelConfig,
    module: TorchDecoder,
    encoded: EncodedRecords,
    vocabulary: Vocabulary,
    ours: dict[str, np.ndarray],
) -> dict[str, Any]:
    """Times TransformerLens by `_peer` on the device of `module`, and names its version."""
    from benchmarks.peers.transformer_lens import TransformerLensAblations, hooked_transformer

    hooked = hooked_transformer(model, module.state_dict())
    version = {"version": importlib.metadata.version("transformer-lens")}
    return version | _peer(TransformerLensAblations, hooked, encoded, vocabulary, ours)


def _differing_answers(ours: dict[str, np.ndarray], theirs: dict[tuple[int, ...], tuple[np.ndarray, ...]]) -> int:
    """Counts the answers on which the two sides differ, summed over sequences and ablations."""
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
