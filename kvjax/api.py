"""What the command line does to whole runs, as functions: the sweep, with a dataset in hand at the end."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvjax.devices import start_jax
from kvjax.errors import unusable
from kvjax.pipeline.settings import ResultSettings, RunsOnBenchmark, SweepInputs
from kvjax.pipeline.sweep import sweep as sweep_stage
from kvjax.sweeps.settings import SweepSettings

if TYPE_CHECKING:
    import xarray as xr

    from kvjax.sweeps.results import SweepReport


def sweep(
    run_dirs: str | Path | Sequence[str | Path],
    *,
    probe_set: str | Path | None = None,
    benchmark_dir: str | Path | None = None,
    steps: str | int | Sequence[int] = "all",
    reference: str | int = "final",
    wait: bool = False,
    **settings: Any,
) -> xr.Dataset:
    """Measures every checkpoint of runs and returns the means; the tables beside each run are written as well.

    Checkpoints that were measured before are not measured again. If JAX has not computed anything yet in this process,
    every CPU core becomes a device, and compiled programs are cached, as by the command.

    Args:
      run_dirs: run directories, or globs.
      probe_set: the probe set to measure on; each run's own if None.
      benchmark_dir: the runs' benchmark; the one each run's config records, or that it was swept on, if None.
      steps: the checkpoints to measure: `all`, a step, several, or ranges such as `250,1000-4000`. Earlier measurements
        are returned as well.
      reference: the checkpoint that drift is also measured to: `final`, `best` or a step.
      wait: wait while another command writes results of a run, instead of raising.
      **settings: fields of `SweepSettings`, such as `ablations=("zero",)` or `probe="none"`.

    Returns:
      Every mean of docs/definitions.md with named dimensions (`step`, `split`, `stage`, `layer`, `head`, …) and the
      attributes `units` and `long_name`; for several runs with a first dimension `run` (names, or paths where names
      repeat) and a coordinate `seed`, NaN where one lacks a step.
      `<name>_low` and `<name>_high` are the ends of the 95 % intervals of the means that have one.

    Raises:
      InputError: a run, its benchmark or the probe set cannot be used, or another command writes a run's results.
    """
    import xarray as xr  # imported here, because commands that only measure need not wait for it

    start_jax()
    given = [run_dirs] if isinstance(run_dirs, str | Path) else list(run_dirs)
    reports = sweep_stage(
        RunsOnBenchmark(run_dirs=tuple(map(str, given)), benchmark_dir=benchmark_dir and str(benchmark_dir)),
        SweepInputs(probe_set=probe_set and str(probe_set), steps=_as_text(steps), reference=str(reference)),
        SweepSettings(**settings),
        results=ResultSettings(wait=wait),
    )
    datasets = [_with_intervals(report) for report in reports if report.dataset is not None]
    if not datasets:
        raise unusable(", ".join(map(str, given)), "a run with a usable checkpoint", "none")
    if len(datasets) == 1:
        return datasets[0]
    names = [dataset.attrs["run_name"] for dataset in datasets]
    if len(set(names)) < len(names):
        names = [str(report.run.path) for report in reports if report.dataset is not None]
    runs = xr.DataArray(names, dims="run", name="run")
    joined = xr.concat(datasets, runs, join="outer", combine_attrs="drop_conflicts")
    return joined.assign_coords(seed=("run", [dataset.attrs.get("seed", math.nan) for dataset in datasets]))


def _as_text(steps: str | int | Sequence[int]) -> str:
    """Writes steps as the setting of that name takes them."""
    if isinstance(steps, str):
        return steps
    return ",".join(map(str, [steps] if isinstance(steps, numbers.Integral) else steps))


def _with_intervals(report: SweepReport) -> xr.Dataset:
    """Puts the ends of intervals, of means and of their changes, beside the means."""
    dataset = report.dataset
    for name, variable in report.intervals.data_vars.items():
        mean = str(name).removesuffix("_change")
        units = {"units": dataset[mean].attrs["units"]}
        if name not in dataset:
            attrs = units | {"long_name": f"change of {mean} from the previous checkpoint"}
            dataset = dataset.assign({name: variable.sel(statistic="estimate", drop=True).assign_attrs(attrs)})
        for end in ("low", "high"):
            attrs = units | {"long_name": f"{end} end of the 95 % interval of {name}"}
            dataset = dataset.assign({f"{name}_{end}": variable.sel(statistic=end, drop=True).assign_attrs(attrs)})
    return dataset
