"""Times `kvjax intervene` of two checkouts side by side, and compares their results.

    python -m benchmarks.intervene_beside --checkouts=OTHER,THIS --run_dir=… --benchmark_dir=… --probe_set=… \
        --steps=3000,4000,6000

Each checkout has an environment of its own, `.venv`, in which it is installed. The checkouts take turns, each call a
process of its own:

- cold: nothing is compiled or converted yet.
- warm: programs and parameters are there, and everything is measured again.

A call measures all kinds. The time of one is read off the moments at which results were written; the first one's
includes starting and loading. Ratios are of the first checkout to the second. On a busy machine, CPU time says more
than wall time.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from absl import app, flags

from benchmarks.reporting import machine, write_result
from kvjax.errors import InputError

KINDS = "activation_patching,path_patching,necessity,across_checkpoints,subspaces,attribution"

FLAGS = flags.FLAGS
flags.DEFINE_list("checkouts", None, "The two checkouts, the earlier one first.", required=True)
flags.DEFINE_string("run_dir", None, "The run.", required=True)
flags.DEFINE_string("benchmark_dir", None, "The run's benchmark.", required=True)
flags.DEFINE_string("probe_set", None, "The probe set that pairs are made from.", required=True)
flags.DEFINE_string("steps", "3000,4000,6000", "Checkpoints.")
flags.DEFINE_list("kinds", KINDS.split(","), "Kinds of intervention.")
flags.DEFINE_integer("pairs_per_kind", 96, "Pairs of each kind.", lower_bound=1)
flags.DEFINE_integer("cold", 1, "Cold calls of each checkout.", lower_bound=0)
flags.DEFINE_integer("warm", 1, "Warm calls of each checkout; programs are there after a cold one.", lower_bound=0)
flags.DEFINE_multi_string("first_flags", [], "Further flags of the first checkout's command; may be repeated.")
flags.DEFINE_multi_string("second_flags", [], "Likewise of the second's, such as --rank_by=mean.")
flags.DEFINE_float("tolerance", 1e-3, "Differences allowed, absolute and relative to the larger number.", lower_bound=0)
flags.DEFINE_string("name", "intervene_beside", "Name of the result file.")


@dataclasses.dataclass(frozen=True)
class Side:
    """One checkout, with copies of the run and a cache of its own.

    Attributes:
      command: its `kvjax`.
      folder: where the run, its results and the cache lie.
      flags: further flags of its command.
    """

    command: Path
    folder: Path
    flags: Sequence[str]

    @classmethod
    def of(cls, checkout: str, folder: Path, flags: Sequence[str]) -> Side:
        """Copies the run and the probe set for a checkout.

        Raises:
          InputError: the checkout has no environment.
        """
        command = Path(checkout) / ".venv" / "bin" / "kvjax"
        if not command.is_file():
            raise InputError(f"{checkout}: expected kvjax in .venv/bin; found none; install the checkout there")
        shutil.copytree(FLAGS.run_dir, folder / "run", ignore=shutil.ignore_patterns("analysis"))
        given = Path(FLAGS.probe_set)
        for path in given.parent.glob(f"{given.stem}.*"):
            shutil.copy(path, folder / path.name)
        return cls(command, folder, flags)

    @property
    def results(self) -> Path:
        """The folder of the results, one folder in it for each kind."""
        return self.folder / "run" / "analysis" / "interventions"

    def call(self, *, cold: bool) -> dict[str, Any]:
        """Measures everything again: seconds of wall and CPU time, and wall time by kind."""
        shutil.rmtree(self.results, ignore_errors=True)
        if cold:
            shutil.rmtree(self.folder / "cache", ignore_errors=True)
            shutil.rmtree(self.folder / "run" / "analysis", ignore_errors=True)
        command = [
            str(self.command),
            "intervene",
            f"--run_dirs={self.folder / 'run'}",
            f"--benchmark_dir={FLAGS.benchmark_dir}",
            f"--probe_set={self.folder / Path(FLAGS.probe_set).name}",
            f"--steps={FLAGS.steps}",
            f"--kinds={','.join(FLAGS.kinds)}",
            f"--pairs_per_kind={FLAGS.pairs_per_kind}",
            "--force",
            "--progress=false",
            *self.flags,
        ]
        environment = os.environ | {"KVJAX_CACHE_DIR": str(self.folder / "cache")}
        start = time.time()
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd=self.folder) as process:
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.time() - start
        if process.returncode:
            raise InputError(f"{self.command}: expected exit status 0; found {process.returncode}")
        written = {kind: max(p.stat().st_mtime for p in (self.results / kind).iterdir()) for kind in FLAGS.kinds}
        by_kind, before = {}, start
        for kind in sorted(written, key=written.__getitem__):
            by_kind[kind], before = round(written[kind] - before, 2), written[kind]
        return {"wall": round(wall, 2), "cpu": round(used.ru_utime + used.ru_stime, 2), "by_kind": by_kind}


def main(argv: list[str]) -> None:
    del argv
    if len(FLAGS.checkouts) != 2:
        raise InputError(f"--checkouts: expected two; found {len(FLAGS.checkouts)}")
    with tempfile.TemporaryDirectory() as scratch:
        sides = []
        for name, checkout in zip(("first", "second"), FLAGS.checkouts, strict=True):
            (Path(scratch) / name).mkdir()
            sides.append(Side.of(checkout, Path(scratch) / name, getattr(FLAGS, f"{name}_flags")))
        calls: dict[str, list[list[dict[str, Any]]]] = {"cold": [], "warm": []}
        for name, count in (("cold", FLAGS.cold), ("warm", FLAGS.warm)):
            for _ in range(count):
                calls[name].append([side.call(cold=name == "cold") for side in sides])
                print(name, *calls[name][-1], flush=True)
        compared = {kind: compare(sides[0].results / kind, sides[1].results / kind) for kind in FLAGS.kinds}
    result = {
        "what": "kvjax intervene by two checkouts, whole commands, seconds",
        "machine": machine(),
        "steps": FLAGS.steps,
        "pairs_per_kind": FLAGS.pairs_per_kind,
        "flags": [FLAGS.first_flags, FLAGS.second_flags],
        "calls": calls,
        "ratios": {name: ratios(of_name) for name, of_name in calls.items() if of_name},
        "results": compared,
    }
    print_ratios(result["ratios"])
    for kind, differences in compared.items():
        print(f"{kind}: {len(differences['equal'])} arrays equal within {FLAGS.tolerance}", *differences["unlike"])
        print("  in one checkout only:", len(differences["in_one_only"]), "arrays and labels")
    print(write_result(FLAGS.name, result))
    if any(differences["unlike"] for differences in compared.values()):
        sys.exit(1)


def ratios(calls: Sequence[Sequence[dict[str, Any]]]) -> dict[str, float]:
    """Divides the first checkout's shortest time by the second's, in all and by kind."""

    def best(side: int, read: Any) -> float:
        return min(read(call[side]) for call in calls)

    found = {name: best(0, lambda c, n=name: c[n]) / best(1, lambda c, n=name: c[n]) for name in ("wall", "cpu")}
    for kind in FLAGS.kinds:
        found[kind] = best(0, lambda c, k=kind: c["by_kind"][k]) / best(1, lambda c, k=kind: c["by_kind"][k])
    return {name: round(ratio, 2) for name, ratio in found.items()}


def print_ratios(found: dict[str, dict[str, float]]) -> None:
    """Prints the ratios, a column for cold calls and one for warm ones."""
    print(f"{'times faster':<22}", *(f"{name:>6}" for name in found))
    for row in next(iter(found.values()), {}):
        print(f"{row:<22}", *(f"{column[row]:6.2f}" for column in found.values()))


def compare(first: Path, second: Path) -> dict[str, list[str]]:
    """Compares the arrays of one kind, by their labels.

    A dimension that only one checkout has is compared at its first label: results of several metrics begin with the
    one that they had before.

    Returns:
      The names of the arrays that are `equal`; those that are `unlike`, with the largest difference; and what is
      `in_one_only`: arrays, and labels of dimensions.
    """
    found: dict[str, list[str]] = {"equal": [], "unlike": [], "in_one_only": []}
    for path in sorted(first.glob("*.nc")):
        with xr.open_dataset(path) as of_first, xr.open_dataset(second / path.name) as of_second:
            a, b = _with_labels_of_today(of_first), _with_labels_of_today(of_second)
            found["in_one_only"] += sorted(set(map(str, a.variables)) ^ set(map(str, b.variables)))
            for name in sorted(set(a.data_vars) & set(b.data_vars), key=str):
                x, y = (_at_shared(mine[name], other[name]) for mine, other in ((a, b), (b, a)))
                for dim in x.dims:
                    if dim in a.coords and dim in b.coords:
                        left_out = set(a[dim].values.tolist()) ^ set(b[dim].values.tolist())
                        found["in_one_only"] += [f"{name}: {dim} {label}" for label in sorted(left_out, key=str)]
                x, y = xr.align(x, y, join="inner")
                text = _difference(x.values, y.transpose(*x.dims).values)
                if text is None:
                    found["equal"].append(str(name))
                else:
                    found["unlike"].append(f"{name}: {text}")
    return found


def _with_labels_of_today(dataset: xr.Dataset) -> xr.Dataset:
    """Renames MLP0, as MLPs were called up to November 2026, to L0.mlp in labels, rankings and paths."""
    texts = {name: x for name, x in dataset.variables.items() if x.dtype.kind in "OUS"}
    rename = np.vectorize(lambda text: re.sub(r"\bMLP(\d+)\b", r"L\1.mlp", str(text)), otypes=[object])
    return dataset.assign({name: (x.dims, rename(x.values)) for name, x in texts.items() if x.size})


def _at_shared(x: xr.DataArray, other: xr.DataArray) -> xr.DataArray:
    return x.isel({dim: 0 for dim in x.dims if dim not in other.dims})


def _difference(x: np.ndarray, y: np.ndarray) -> str | None:
    """Says how two arrays differ; None if they agree within the tolerance."""
    if x.dtype.kind not in "fiu":
        return None if (x == y).all() else f"{int((x != y).sum())} of {x.size} labels differ"
    x, y = x.astype(float), y.astype(float)
    close = np.isclose(x, y, rtol=FLAGS.tolerance, atol=FLAGS.tolerance, equal_nan=True)
    if close.all():
        return None
    return f"{int((~close).sum())} of {x.size} differ, at most by {np.nanmax(np.abs(x - y)):.3g}"


if __name__ == "__main__":
    app.run(main)
