"""Measures how the sweep's time grows with checkpoints, probe sequences, depth, width and heads.

    python -m benchmarks.scaling

Random weights on a freshly drawn benchmark; clean measures and zero ablations. One axis moves at a time from a base
of the reference shape on fewer records. `growth` is seconds over seconds of the row before, beside the growth of the
arithmetic that cannot be avoided.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from benchmarks.flops import zero_ablation_flops
from benchmarks.reporting import machine, median_seconds, write_result
from kvjax.config.benchmark import BenchmarkConfig
from kvjax.config.files import find_config, read_config
from kvjax.devices import share_cpu_cores
from kvjax.model.decoder import Decoder
from kvjax.model.decoder_config import DecoderConfig
from kvjax.sweeps.compiled_sweep import CompiledSweep
from kvjax.sweeps.settings import SweepSettings
from kvjax.task.benchmark import Benchmark, generate_benchmark
from kvjax.task.encoding import encode_records

FLAGS = flags.FLAGS
flags.DEFINE_integer("repeats", 3, "Timed calls; the median is reported.", lower_bound=1)

SPLITS = ("validation_iid", "structural_ood")
BASE = {"d_model": 128, "n_layers": 3, "n_heads": 4, "d_ff": 512, "max_seq_len": 96}
AXES: dict[str, tuple[int, ...]] = {
    "checkpoints": (2, 4, 8),
    "sequences": (48, 96, 192),
    "layers": (2, 3, 6),
    "width": (64, 128, 256),
    "heads": (2, 4, 8),
}


def main(argv: list[str]) -> None:
    del argv
    share_cpu_cores()
    settings = read_config(find_config("symbolic_kv_base", "benchmark"), BenchmarkConfig)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        generate_benchmark(settings, Path(scratch) / "benchmark", overwrite=False)
        benchmark = Benchmark.open(Path(scratch) / "benchmark")
        records = {split: benchmark.read_split(split) for split in SPLITS}
    for axis, values in AXES.items():
        for value in values:
            rows.append(_measure(benchmark, records, axis, value))
            before = rows[-2] if value != values[0] else None
            growth = {name: rows[-1][name] / before[name] if before else None for name in ("seconds", "gflop")}
            rows[-1] |= {"growth": growth["seconds"], "growth_of_work": growth["gflop"]}
            shown = " ".join(f"{x:8.2f}" if x is not None else "       –" for x in growth.values())
            print(f"{axis:12s} {value:5d} {rows[-1]['seconds']:8.3f} s {shown}", flush=True)
    print(write_result("scaling", {"what": __doc__.splitlines()[0], "machine": machine(), "rows": rows}))


def _measure(benchmark: Benchmark, records: dict[str, list], axis: str, value: int) -> dict[str, float | int | str]:
    shape, sequences, checkpoints = dict(BASE), 96, 2
    match axis:
        case "checkpoints":
            checkpoints = value
        case "sequences":
            sequences = value
        case "layers":
            shape["n_layers"] = value
        case "width":
            shape |= {"d_model": value, "d_ff": 4 * value}
        case "heads":
            shape["n_heads"] = value
    config = DecoderConfig(vocab_size=len(benchmark.vocabulary.tokens), **shape)
    chosen = [record for split in SPLITS for record in records[split][: sequences // len(SPLITS)]]
    encoded = encode_records(chosen, benchmark.vocabulary, SPLITS, max_seq_len=config.max_seq_len)
    settings = SweepSettings(ablations=("zero",), probe="none", checkpoint_batch=str(checkpoints))
    program = CompiledSweep(config, benchmark.vocabulary, encoded, len(SPLITS), settings)
    params = Decoder(config).init(jax.random.key(0), np.ones((1, 4), np.int32))["params"]
    stacked = [jax.tree.map(np.asarray, params)] * checkpoints
    program.measure(stacked)
    seconds = median_seconds(lambda: program.measure(stacked), FLAGS.repeats)
    gflop = checkpoints * zero_ablation_flops(config, encoded) / 1e9
    return {"axis": axis, "value": value, "seconds": seconds, "gflop": gflop, **dataclasses.asdict(config)}


if __name__ == "__main__":
    app.run(main)
