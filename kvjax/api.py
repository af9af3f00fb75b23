"""What the command line does to whole runs, as functions: the sweep, with a dataset in hand at the end."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvjax.artifacts.results import RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.devices import bound_accelerator_memory, start_jax
from kvjax.errors import bad_argument, note, unusable
from kvjax.pipeline.settings import ComparisonOutput, ReportSettings, ResultSettings, Runs, RunsOnBenchmark, SweepInputs
from kvjax.pipeline.sweep import sweep as sweep_stage
from kvjax.sweeps.settings import SweepSettings

if TYPE_CHECKING:
    import xarray as xr

    from kvjax.report.charts.description import Chart
    from kvjax.sweeps.results import SweepReport


class Results(RunResults):
    """The results of a run (`RunResults`); a notebook shows them as a short summary."""

    def _repr_html_(self) -> str:
        from kvjax.report.summary import summary_html

        return summary_html(self)


def open_results(run: str | Path) -> Results:
    """Opens the results of a run directory; each file is read when it is first asked for.

    Raises:
      InputError: there is no run.
    """
    return Results(RunDir.open(Path(run)))


def charts(run_dirs: str | Path | Sequence[str | Path], **settings: Any) -> dict[str, Chart]:
    """Makes the charts of a report, for a notebook or a paper.

    Args:
      run_dirs: run directories, or globs.
      **settings: fields of `ReportSettings`, such as `heads=("L0H3",)`.

    Returns:
      Charts by name, such as `behaviour_answer_accuracy` (of several runs `run0_behaviour_…`). Each has `plotly()` and
      `matplotlib()`, which return a figure.

    Raises:
      InputError: a run or a setting cannot be used.
    """
    from kvjax.pipeline.report import make_page

    start_jax()
    given = (str(run_dirs),) if isinstance(run_dirs, str | Path) else tuple(map(str, run_dirs))
    return make_page(ReportSettings(run_dirs=given, **settings)).charts()


def sweep(
    run_dirs: str | Path | Sequence[str | Path],
    *,
    probe_set: str | Path | None = None,
    benchmark_dir: str | Path | None = None,
    steps: str | int | Sequence[int] = "all",
    reference: str | int = "final",
    output_dir: str | Path | None = None,
    wait: bool = False,
    mixed: str = "refuse",
    join: str = "outer",
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
      output_dir: where results go, instead of into the run directory; for several runs, a folder in it each. It can be
        named in place of the run directory from then on.
      wait: wait while another command writes results of a run, instead of raising.
      mixed: what becomes of runs that would be measured on several benchmarks or probe sets: `refuse` raises before
        anything is measured, `join` puts them into one result with a note.
      join: the steps of several runs: `outer` has NaN wherever a run lacks a step, with a note that names it, `inner`
        the steps that all have, `exact` raises if they differ.
      **settings: fields of `SweepSettings`, such as `ablations=("zero",)` or `probe="none"`.

    Returns:
      Every mean of docs/definitions.md with named dimensions (`step`, `split`, `stage`, `layer`, `head`, …) and the
      attributes `units` and `long_name`; for several runs with a first dimension `run` (names, or paths where names
      repeat) and the coordinates `seed`, `benchmark_sha256` and `probe_set_sha256`.
      `<name>_low` and `<name>_high` are the ends of the 95 % intervals of the means that have one.

    Raises:
      InputError: a run, its benchmark or the probe set cannot be used, or another command writes a run's results.
    """
    import xarray as xr  # imported here, because commands that only measure need not wait for it

    chosen = SweepSettings(**settings)
    if chosen.memory_gb is not None:
        bound_accelerator_memory(chosen.memory_gb)
    start_jax()
    _check_choice("mixed", mixed, ("refuse", "join"))
    _check_choice("join", join, ("outer", "inner", "exact"))
    given = [run_dirs] if isinstance(run_dirs, str | Path) else list(run_dirs)
    reports = sweep_stage(
        RunsOnBenchmark(run_dirs=tuple(map(str, given)), benchmark_dir=benchmark_dir and str(benchmark_dir)),
        SweepInputs(probe_set=probe_set and str(probe_set), steps=_as_text(steps), reference=str(reference)),
        chosen,
        results=ResultSettings(output_dir=output_dir and str(output_dir), wait=wait),
        mixed=mixed,
    )
    datasets = [_with_intervals(report) for report in reports if report.dataset is not None]
    if not datasets:
        raise unusable(", ".join(map(str, given)), "a run with a usable checkpoint", "none")
    for report in reports:
        if report.dataset is None:
            note(f"{report.run.path}: left out, for it has no usable checkpoint")
    if len(datasets) == 1:
        return datasets[0]
    names = [dataset.attrs["run_name"] for dataset in datasets]
    if len(set(names)) < len(names):
        names = [str(report.run.path) for report in reports if report.dataset is not None]
    runs = xr.DataArray(names, dims="run", name="run")
    datasets = _with_steps_joined(datasets, names, join)
    # What else differs, such as the layers of two shapes, is joined with NaN as well.
    joined = xr.concat(datasets, runs, join="outer", combine_attrs="drop_conflicts")
    of_runs = {"seed": math.nan, "benchmark_sha256": "", "probe_set_sha256": ""}
    return joined.assign_coords(
        {name: ("run", [dataset.attrs.get(name, absent) for dataset in datasets]) for name, absent in of_runs.items()}
    )


def compare_seeds(
    run_dirs: str | Path | Sequence[str | Path],
    *,
    align: str = "exact",
    allow_other_probe_sets: bool = False,
    stage: str = "latest_birth",
    null_draws: int = 1000,
    output_dir: str | Path | None = None,
) -> xr.DataTree:
    """Compares swept runs that differ in their seed (docs/definitions.md, "Across seeds").

    Args:
      run_dirs: run directories with a sweep and birth windows, or globs.
      align: how runs with other steps or planned lengths are compared: `exact` refuses them, `intersection` takes the
        steps that all have, `interpolate` fills in between.
      allow_other_probe_sets: whether runs measured on different probe sets may stand side by side.
      stage: where roles are compared: `latest_birth`, the latest birth of an answer that all runs have reached; `last`,
        their last checkpoints; or the metric of a birth, such as `heldout_answer_accuracy`.
      null_draws: draws of the nulls that matched roles and addresses are compared with.
      output_dir: where the command's files go as well; none are written if None.

    Returns:
      At the root every measure [run, step, …], role scores and the trajectories of roles; groups `events` (births,
      half-rises, stabilization, with censoring), `order` and `matching`. The attribute `findings` has the sentences.

    Raises:
      InputError: a run lacks a result, or the runs cannot be compared.
    """
    import xarray as xr

    from kvjax.compare.labelled import groups_of
    from kvjax.compare.settings import CompareSettings
    from kvjax.pipeline import compare_seeds as stages

    given = [run_dirs] if isinstance(run_dirs, str | Path) else list(run_dirs)
    runs = Runs(run_dirs=tuple(map(str, given)))
    settings = CompareSettings(
        align=align, allow_other_probe_sets=allow_other_probe_sets, stage=stage, null_draws=null_draws
    )
    if output_dir is None:
        made = stages.compare_runs(runs, settings)
    else:
        made = stages.compare_seeds(runs, settings, ComparisonOutput(output_dir=str(output_dir))).comparison
    groups = {f"/{name or ''}": dataset for name, dataset in groups_of(made.dataset, made.document)}
    tree = xr.DataTree.from_dict(groups)
    tree.attrs["findings"] = made.document["findings"]
    return tree


def _check_choice(parameter: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise bad_argument(parameter, f"one of {', '.join(choices)}", value)


def _with_steps_joined(datasets: list[xr.Dataset], names: Sequence[str], join: str) -> list[xr.Dataset]:
    """Cuts runs to the steps that all have if asked for, refuses runs whose steps differ, or notes what each lacks."""
    steps = [set(dataset["step"].values.tolist()) for dataset in datasets]
    for name, own in zip(names, steps, strict=True):
        lacks = sorted(set.union(*steps) - own)
        if not lacks or join == "inner":
            continue
        listed = f"step{'s' if len(lacks) > 1 else ''} {', '.join(map(str, lacks[:5]))}{', …' if lacks[5:] else ''}"
        if join == "exact":
            raise unusable(name, "the steps of the other runs (or another `join`)", f"no {listed}")
        note(f"{name} lacks {listed}, which other runs have: NaN in the joined result")
    if join == "inner":
        common = sorted(set.intersection(*steps))
        if not common:
            raise bad_argument("join", "a step that all runs have, to join them by `inner`", "none")
        datasets = [dataset.sel(step=common) for dataset in datasets]
    return datasets


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
