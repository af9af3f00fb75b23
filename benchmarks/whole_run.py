"""Measures time and memory of `kvjax checkpoint-sweep` on runs of many checkpoints, from `.pt` files to tables.

    python -m benchmarks.whole_run --run_dir=… --benchmark_dir=… --probe_set=…
    python -m benchmarks.whole_run … --runs=5 --name=whole_runs

The command runs three times, in a process of its own each: cold (nothing compiled, converted or measured), warm
(compiled programs and converted parameters are there, all is measured again), and again with everything measured. Time
that the devices did not take is the rest: start, tracing and compiling or loading programs, hashing, reading,
converting, rendering tables. The first call of the devices holds both: it counts as a typical later call, and its
remainder as preparing the program. The first row is there when the sums of the first checkpoint are stored, counted
from the start of the process; that of a complete sweep of a run's own checkpoints is timed by

    python -m benchmarks.whole_run … --copies=1 --sweep_flags= --name=first_row
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from benchmarks.longer_run import longer_run
from benchmarks.reporting import machine, write_result
from kvjax.artifacts.files import read_json
from kvjax.artifacts.run_dir import RunDir

FLAGS = flags.FLAGS
flags.DEFINE_string("run_dir", None, "The run.", required=True)
flags.DEFINE_string("benchmark_dir", None, "The run's benchmark.", required=True)
flags.DEFINE_string("probe_set", None, "The probe set to measure on.", required=True)
flags.DEFINE_integer("copies", 8, "How often each checkpoint is taken, to make a longer run.", lower_bound=1)
flags.DEFINE_integer("runs", 1, "How many such runs one command sweeps.", lower_bound=1)
flags.DEFINE_list("sweep_flags", ["--ablations=zero", "--probe=none"], "Flags of the sweep.")
flags.DEFINE_string("name", "whole_run", "Name of the result file.")


def main(argv: list[str]) -> None:
    del argv
    calls = {}
    with tempfile.TemporaryDirectory() as scratch:
        source = RunDir.open(Path(FLAGS.run_dir))
        runs = [longer_run(source, FLAGS.copies, Path(scratch) / f"run_{i}") for i in range(FLAGS.runs)]
        cache = Path(scratch) / "cache"
        for name in ("cold", "warm", "again"):
            if name == "warm":
                for run in runs:
                    shutil.rmtree(run.analysis / "measured")
            calls[name] = _sweep(runs, cache)
            print(name, calls[name], flush=True)
    result = {
        "what": "kvjax checkpoint-sweep, whole commands",
        "machine": machine(),
        "runs": len(runs),
        "checkpoints": sum(len(run.checkpoints) for run in runs),
        "flags": FLAGS.sweep_flags,
        "calls": calls,
    }
    print(write_result(FLAGS.name, result))


def _sweep(runs: Sequence[RunDir], cache: Path) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "kvjax.commands.main",
        "checkpoint-sweep",
        f"--run_dirs={','.join(str(run.path) for run in runs)}",
        "--noprogress",
    ]
    command += [f"--benchmark_dir={FLAGS.benchmark_dir}", f"--probe_set={FLAGS.probe_set}", *FLAGS.sweep_flags]
    start, began = time.perf_counter(), time.time()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "KVJAX_CACHE_DIR": str(cache)})
    seconds = time.perf_counter() - start
    first_stored = _first_stored(runs[0])
    on_devices = preparing = 0.0
    for run in runs:
        timings = read_json(run.analysis / "sweep.json")["timings"]
        first, later = timings["first_call_seconds"] or 0.0, timings["later_call_seconds"]
        typical = min(first, statistics.median(later)) if later else first
        on_devices += typical + sum(later)
        preparing += first - typical
    return {
        "seconds": seconds,
        "first_row": None if first_stored < began else first_stored - began,
        "on_devices": on_devices,
        "preparing_the_program": preparing,
        "elsewhere": seconds - on_devices,
        # The largest of the commands so far: later ones need no more than the first.
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9,
    }


def _first_stored(run: RunDir) -> float:
    """Finds when the first sums of a checkpoint were stored, in seconds since the epoch."""
    return min(path.stat().st_mtime for path in (run.analysis / "measured").glob("step_*.npz"))


if __name__ == "__main__":
    app.run(main)
