"""Measures how memory and time of commands grow with the number of checkpoints of a run, and of runs.

    python -m benchmarks.many [--checkpoints=100,1000] [--runs=10,100]

Tiny models with random weights, each file another one. Each command runs in a process of its own, with compiled
programs there: opening the runs, the first sweep, a sweep that finds everything current, `status`, and
`kvjax.open_results` on the means of one run. Memory is the largest that the process had.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from kvjax.converters.to_torch import to_torch
from kvjax.converters.torch_checkpoint import write_checkpoint

from benchmarks.fuzzing.material import benchmark_config, train_config
from benchmarks.reporting import machine, write_result
from kvjax.artifacts.layout import RunLayout
from kvjax.config.benchmark import BenchmarkConfig
from kvjax.config.run import ModelConfig
from kvjax.model.decoder import Decoder
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params
from kvjax.task.benchmark import Benchmark, generate_benchmark

FLAGS = flags.FLAGS
flags.DEFINE_list("checkpoints", ["10", "100", "1000"], "Numbers of checkpoints of one run.")
flags.DEFINE_list("runs", ["10", "100"], "Numbers of runs, of 10 checkpoints each.")

_OF_A_RUN = 10
_SWEEP = ("checkpoint-sweep", "--ablations=zero", "--probe=none", "--noprogress")
_OPENING = "from kvjax.artifacts.find_runs import find_run_dirs; find_run_dirs(sys.argv[1:])"
_RESULTS = "import kvjax; kvjax.open_results(sys.argv[1]).metrics"
_COMMAND = "from kvjax.commands.main import main; assert main(sys.argv[1:]) == 0"
_PEAK = "print(*(line for line in open('/proc/self/status') if line.startswith('VmHWM')), file=sys.stderr)"


def main(argv: list[str]) -> None:
    del argv
    result = {"what": __doc__.splitlines()[0], "machine": machine(), "rows": []}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        generate_benchmark(BenchmarkConfig.model_validate(benchmark_config()), scratch / "benchmark", overwrite=False)
        os.environ["KVJAX_CACHE_DIR"] = str(scratch / "cache")
        for number, checkpoints in enumerate([3, *map(int, FLAGS.checkpoints)]):  # the first compiles
            _write_run(scratch / f"run_{checkpoints}", scratch / "benchmark", checkpoints)
            row = {"runs": 1, "checkpoints": checkpoints} | _measure([scratch / f"run_{checkpoints}"])
            if number:
                _add(result, row)
        for runs in map(int, FLAGS.runs):
            folders = [scratch / f"{runs}_runs" / f"run_{index}" for index in range(runs)]
            for folder in folders:
                _write_run(folder, scratch / "benchmark", _OF_A_RUN)
            _add(result, {"runs": runs, "checkpoints": _OF_A_RUN} | _measure(folders))


def _add(result: dict[str, Any], row: dict[str, Any]) -> None:
    """Adds a row to the result and writes it, so that a stopped benchmark keeps the rows it has."""
    result["rows"].append(row)
    print(json.dumps(row), write_result("many", result), flush=True)


def _measure(runs: list[Path]) -> dict[str, Any]:
    named = f"--run_dirs={runs[0] if len(runs) == 1 else runs[0].parent / '*'}"
    return {
        "opening": _time(_OPENING, *map(str, runs)),
        "first_sweep": _time(_COMMAND, *_SWEEP, named),
        "sweep_again": _time(_COMMAND, *_SWEEP, named),
        "status": _time(_COMMAND, "status", named),
        "open_results": _time(_RESULTS, str(runs[0])),
    }


def _time(code: str, *arguments: str) -> dict[str, float]:
    """Runs Python code in a process of its own; returns its time, and its largest memory as the system counts it."""
    start = time.perf_counter()
    command = [sys.executable, "-c", f"import sys; {code}; {_PEAK}", *arguments]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - start
    peak = next(line for line in reversed(done.stderr.splitlines()) if line.startswith("VmHWM"))
    return {"seconds": round(seconds, 2), "peak_mb": round(int(peak.split()[1]) / 1024)}


@functools.cache
def _initial(config: DecoderConfig) -> Params:
    return Decoder(config).init(jax.random.key(0), np.ones((1, 4), np.int32))["params"]


def _write_run(folder: Path, benchmark_dir: Path, checkpoints: int) -> None:
    """Writes a run of a tiny model that drifts at random."""
    benchmark = Benchmark.open(benchmark_dir)
    document = train_config() | {
        "run_name": folder.name,
        "benchmark_dir": str(benchmark_dir),
        "num_steps": checkpoints,
        "checkpoint_every_steps": 1,
    }
    model = ModelConfig.model_validate(document["model"])
    config = DecoderConfig.from_model_config(model, len(benchmark.vocabulary.tokens))
    state = to_torch(jax.tree.map(np.array, _initial(config)))
    layout, chance = RunLayout(folder), np.random.default_rng(0)
    layout.checkpoints.mkdir(parents=True)
    layout.config.write_text(json.dumps(document))
    for step in range(1, checkpoints + 1):
        for tensor in state.values():
            tensor.add_(0.01 * float(chance.normal()))
        write_checkpoint(layout.step_checkpoint(step), step=step, state=state, config={}, metrics={})


if __name__ == "__main__":
    app.run(main)
