"""A few damaged inputs of every reader, without the processes that guard the long run."""

from __future__ import annotations

import collections
import shutil
import warnings
from pathlib import Path

from benchmarks.fuzz import DEFECTS, Workspace
from benchmarks.fuzzing.material import BENCHMARK, RUN
from benchmarks.fuzzing.readers import readers_of


def check_fuzzed(folder: Path, run: Path, benchmark: Path, *, step: int, names: list[str], inputs: int) -> None:
    """Tries inputs of the named readers on copies of a run and its benchmark.

    Raises:
      AssertionError: an input ended in a defect, or no input of a reader was noticed at all.
    """
    shutil.copytree(run, folder / "material" / RUN)
    shutil.copytree(benchmark, folder / "material" / BENCHMARK)
    readers = readers_of(step)
    workspace = Workspace(folder / "material", [folder / "lane"], {name: readers[name] for name in names}, seed=7)
    assert sorted(workspace.readers) == sorted(names), "the files of some readers are missing"
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for name in names:
        for index in range(inputs):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # notes on a log that is cut off
                kind, detail = workspace.trial(name, index, 0)
            assert kind not in DEFECTS, f"{name}, input {index}: {kind}: {detail}"
            counts[name, kind] += 1
        assert counts[name, "refused"] + counts[name, "changed"], f"no damage of {name} was noticed"
