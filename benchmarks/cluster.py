"""Times units of work on a local cluster: what one costs beside its work, and how many workers share units that wait.

Units that wait take no core, so that more workers than cores can be timed.

    python -m benchmarks.cluster
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

from distributed import LocalCluster

from benchmarks.reporting import machine, write_result
from kvjax.units.cluster import Cluster
from kvjax.units.unit import Unit

WORKERS = (1, 2, 4)
TRIVIAL = 200
WAITING, SECONDS = 16, 0.2


def seconds_of(engine: Cluster, units: list[Unit]) -> float:
    """Measures the wall-clock seconds of units, connecting and disconnecting included."""
    start = time.perf_counter()
    engine.run(units, lambda done: None)
    return time.perf_counter() - start


def measure(workers: int, repeats: int) -> dict[str, Any]:
    """Times trivial and waiting units on a cluster of so many worker processes."""
    with LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as cluster:
        engine = Cluster(cluster.scheduler_address)
        one = [Unit("nothing", "one", os.getpid)]
        trivial = [Unit("nothing", str(number), os.getpid) for number in range(TRIVIAL)]
        waiting = [Unit("wait", str(number), time.sleep, (SECONDS,)) for number in range(WAITING)]
        seconds_of(engine, one * workers * 4)  # workers import what a unit needs
        alone = statistics.median(seconds_of(engine, one) for _ in range(repeats))
        many = statistics.median(seconds_of(engine, trivial) for _ in range(repeats))
        shared = statistics.median(seconds_of(engine, waiting) for _ in range(repeats))
    least = WAITING * SECONDS / workers
    return {
        "workers": workers,
        "call_of_one_trivial_unit_ms": round(1e3 * alone, 1),
        "per_trivial_unit_ms": round(1e3 * (many - alone) / (TRIVIAL - 1), 2),
        "waiting_units_s": round(shared, 3),
        "overhead_per_waiting_unit_ms": round(1e3 * (shared - least) / (WAITING / workers), 1),
    }


def main() -> None:
    """Prints a line for each number of workers, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    rows = []
    for workers in WORKERS:
        rows.append(measure(workers, repeats))
        print(rows[-1], flush=True)
    units = {"trivial_units": TRIVIAL, "waiting_units": WAITING, "seconds_each": SECONDS}
    write_result("cluster", {"machine": machine(), **units, "rows": rows})


if __name__ == "__main__":
    main()
