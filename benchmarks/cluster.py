"""Times units of work on a local cluster: what one costs beside its work, and how many workers share units that wait.

Units that wait take no core, so that more workers than cores can be timed. With a swept run, also what a unit of each
command costs on a worker of one device, in core seconds, which say more than seconds on a machine that others use.

    python -m benchmarks.cluster
    python -m benchmarks.cluster --run_dir=… --benchmark_dir=… --probe_set=…
"""

from __future__ import annotations

import logging
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import app, flags
from distributed import LocalCluster

from benchmarks.reporting import machine, write_result
from benchmarks.timed_unit import core_seconds_so_far, timed
from kvjax.artifacts.run_dir import RunDir
from kvjax.pipeline.convert import convert
from kvjax.pipeline.evaluate import evaluate
from kvjax.pipeline.settings import (
    ConvertSettings,
    EvaluateSettings,
    Runs,
    RunsOnBenchmark,
    SweepInputs,
    WindowSettings,
)
from kvjax.pipeline.sweep import sweep_over_runs
from kvjax.pipeline.windows import find_birth_windows
from kvjax.sweeps.settings import SweepSettings
from kvjax.units.cluster import Cluster
from kvjax.units.unit import Unit

FLAGS = flags.FLAGS
flags.DEFINE_integer("repeats", 5, "Timed calls; the median is reported.", lower_bound=1)
flags.DEFINE_string("run_dir", None, "A swept run whose commands to time as well.")
flags.DEFINE_string("benchmark_dir", None, "Its benchmark.")
flags.DEFINE_string("probe_set", None, "Its probe set.")
flags.DEFINE_integer("checkpoints", 4, "How many of its checkpoints a timed sweep measures, the last ones.")

WORKERS = (1, 2, 4)
TRIVIAL = 200
WAITING, SECONDS = 16, 0.2


def local_cluster(workers: int) -> LocalCluster:
    """Starts worker processes of one thread."""
    return LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None, silence_logs=logging.ERROR)


def seconds_of(engine: Cluster, units: list[Unit]) -> float:
    """Measures the seconds of units, connecting and disconnecting included."""
    start = time.perf_counter()
    engine.run(units, lambda done: None)
    return time.perf_counter() - start


def shared_units(workers: int, repeats: int) -> dict[str, Any]:
    """Times trivial and waiting units on a cluster of so many worker processes."""
    with local_cluster(workers) as cluster:
        engine = Cluster(cluster.scheduler_address)
        one = [Unit("nothing", "one", os.getpid)]
        trivial = [Unit("nothing", str(number), os.getpid) for number in range(TRIVIAL)]
        waiting = [Unit("wait", str(number), time.sleep, (SECONDS,)) for number in range(WAITING)]
        seconds_of(engine, trivial)  # workers import what a unit needs
        alone = statistics.median(seconds_of(engine, one) for _ in range(repeats))
        many = statistics.median(seconds_of(engine, trivial) for _ in range(repeats))
        shared = statistics.median(seconds_of(engine, waiting) for _ in range(repeats))
    each = WAITING / workers
    return {
        "workers": workers,
        "call_of_one_trivial_unit_ms": round(1e3 * alone, 1),
        "per_trivial_unit_ms": round(1e3 * (many - alone) / (TRIVIAL - 1), 2),
        "waiting_units_s": round(shared, 3),
        "overhead_per_waiting_unit_ms": round(1e3 * (shared / each - SECONDS), 1),
    }


def units_of_a_run(run: Path, benchmark: str, probe_set: str, checkpoints: int) -> dict[str, Any]:
    """Times a unit of each command on copies of a run; the first sweep of a worker compiles, or reads what is kept."""
    with local_cluster(1) as cluster, tempfile.TemporaryDirectory() as folder:
        engine = Cluster(cluster.scheduler_address)
        first, second = (Path(shutil.copytree(run, Path(folder) / name)) for name in ("first", "second"))
        steps = ",".join(map(str, list(RunDir.open(first).checkpoints)[-checkpoints:]))
        on = {"benchmark_dir": benchmark}
        inputs = SweepInputs(probe_set=probe_set, steps=steps)
        stages = {"windows": (find_birth_windows, Runs.of([first]), WindowSettings())}
        for name, path in (("first sweep", first), ("next sweep", second)):
            runs = RunsOnBenchmark(run_dirs=(str(path),), **on)
            stages[name] = (sweep_over_runs, runs, inputs, SweepSettings(overwrite=True))
        stages["evaluation"] = (evaluate, RunsOnBenchmark(run_dirs=(str(first),), **on), EvaluateSettings())
        stages["conversion"] = (convert, RunsOnBenchmark(run_dirs=(str(first),), **on), ConvertSettings())
        (began,) = engine.run([Unit("start", "worker", core_seconds_so_far)], lambda done: None)
        found = {"checkpoints": checkpoints, "start of a worker": {"core_s": began}}
        for name, stage in stages.items():
            (found[name],) = engine.run([Unit(name, str(run), timed, stage)], lambda done: None)
            print(name, found[name], flush=True)
    return found


def main(_: list[str]) -> None:
    """Prints a line for each number of workers and each unit, and writes JSON."""
    rows = []
    for workers in WORKERS:
        rows.append(shared_units(workers, FLAGS.repeats))
        print(rows[-1], flush=True)
    result = {"trivial_units": TRIVIAL, "waiting_units": WAITING, "seconds_each": SECONDS, "shared": rows}
    if FLAGS.run_dir:
        of_run = (Path(FLAGS.run_dir), FLAGS.benchmark_dir, FLAGS.probe_set, FLAGS.checkpoints)
        result["units_of_a_run"] = units_of_a_run(*of_run)
    print(write_result("cluster", {"machine": machine(), **result}))


if __name__ == "__main__":
    app.run(main)
