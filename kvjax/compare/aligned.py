"""Brings the sweeps of several runs side by side: same measures, same probe set, and the same steps as asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import xarray as xr

from kvjax.artifacts.results import RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import bad_argument, unusable


@dataclasses.dataclass(frozen=True)
class SweptRun:
    """A run with its results, as comparisons name it.

    Attributes:
      name: unique among the compared runs.
      results: what was measured on it.
    """

    name: str
    results: RunResults

    @property
    def run(self) -> RunDir:
        return self.results.run

    @property
    def made_from(self) -> tuple[str, str]:
        """What a comparison of it rests on: the hash of its sweep, and that of its story.

        The story records the hashes of the windows and interventions that it rests on.
        """
        return self.results.sweep.measured_on.sweep_sha256, self.results.story.content_sha256

    @property
    def steps(self) -> list[int]:
        """The measured steps, ascending."""
        return self.results.metrics["step"].values.tolist()


def named_runs(runs: Sequence[RunDir]) -> list[SweptRun]:
    """Names runs by `run_name`, by directory where names repeat, and by path where directories do."""
    candidates = (
        [run.config.run_name for run in runs],
        [run.layout.path.resolve().name for run in runs],
        [str(run.path) for run in runs],
    )
    names = next((own for own in candidates if len(set(own)) == len(own)), candidates[-1])
    return [SweptRun(name, RunResults(run)) for name, run in zip(names, runs, strict=True)]


def check_comparable(runs: Sequence[SweptRun], *, allow_other_probe_sets: bool) -> list[str]:
    """Checks that runs may stand side by side, and returns what a reader should know.

    Raises:
      InputError: the models have other shapes, or other probe sets that are not allowed; the remedy is named.
    """
    first, notes = runs[0], []
    shape = _shape(first.run)
    for other in runs[1:]:
        if (found := _shape(other.run)) != shape:
            differing = [name for name in shape if found[name] != shape[name]]
            expected = f"the shape of {first.name}: {', '.join(f'{name} {shape[name]}' for name in differing)}"
            raise unusable(other.run.layout.config, expected, ", ".join(f"{n} {found[n]}" for n in differing))
    by_probe_set: dict[str, list[str]] = {}
    for one in runs:
        by_probe_set.setdefault(one.results.sweep.probe_set.content_sha256, []).append(one.name)
    if len(by_probe_set) > 1:
        groups = list(by_probe_set.values())
        if not allow_other_probe_sets:
            expected = f"the probe set of {groups[0][0]} (sweep with the same `probe_set`, or `allow_other_probe_sets`)"
            other = next(one for one in runs if one.name == groups[1][0])
            raise unusable(other.run.layout.sweep, expected, f"{len(groups)} different ones among {len(runs)} runs")
        notes.append(
            f"{len(groups)} different probe sets: no statistic pairs the same sequences of two runs, and slices differ"
        )
    return notes


def _shape(run: RunDir) -> dict[str, int]:
    return run.config.model.model_dump(include={"d_model", "n_layers", "n_heads", "d_ff", "max_seq_len"})


@dataclasses.dataclass(frozen=True)
class Aligned:
    """The measures of several runs at common steps.

    Attributes:
      dataset: every measure with a step, dimensions (run, step, …).
      notes: in which way the runs differed, and what was done about it.
    """

    dataset: xr.Dataset
    notes: list[str]


def align(runs: Sequence[SweptRun], how: str) -> Aligned:
    """Brings the measures of runs to common steps, in one of the ways of `kvjax.compare.settings.ALIGNMENTS`.

    - `exact` refuses runs whose measured steps or planned lengths differ.
    - `intersection` keeps the steps that every run has.
    - `interpolate` takes all steps within the range that every run covers, and interpolates linearly in between.

    Raises:
      InputError: the runs differ and `how` is `exact`, or they share no step.
    """
    steps = [one.steps for one in runs]
    planned = [one.run.planned_steps for one in runs]
    notes = []
    for what, values in (("measured steps", steps), ("planned lengths", planned)):
        odd = next((i for i, own in enumerate(values) if own != values[0]), None)
        if odd is None:
            continue
        if how == "exact":
            remedy = "align=intersection or align=interpolate"
            expected = f"the {what} of {runs[0].name}, {_described(values[0])} (`{remedy}` compares them all the same)"
            raise unusable(runs[odd].run.path, expected, _described(values[odd]))
        notes.append(f"the runs have different {what}: {runs[odd].name} has {_described(values[odd])}, ")
        notes[-1] += f"{runs[0].name} has {_described(values[0])}"
    if how == "interpolate":
        first, last = max(own[0] for own in steps), min(own[-1] for own in steps)
        common = sorted({step for own in steps for step in own if first <= step <= last})
        filled = sum(step not in own for own in steps for step in common)
        if filled:
            notes.append(f"{filled} of {len(common) * len(runs)} values of each measure are interpolated")
    else:
        common = sorted(set(steps[0]).intersection(*steps))
        dropped = sum(len(own) - len(common) for own in steps)
        if dropped:
            notes.append(f"{dropped} measured checkpoints lie at steps that not every run has, and are left out")
    if not common:
        raise bad_argument("run_dirs", "runs with measured steps in common", "none")
    names = set.intersection(*(_measures(one) for one in runs))
    parts = [_at(one.results.metrics[sorted(names)], common) for one in runs]
    try:
        joined = xr.concat(parts, dim="run", join="exact", coords="minimal", compat="override", combine_attrs="drop")
    except (ValueError, xr.AlignmentError):
        joined = xr.concat(parts, dim="run", join="outer", coords="minimal", compat="override", combine_attrs="drop")
        notes.append("the runs have different slices or axes: what a run lacks is missing in comparison.nc")
    for name in joined.data_vars:
        joined[name].attrs = dict(parts[0][name].attrs)
    return Aligned(joined.assign_coords(run=[one.name for one in runs]), notes)


def _measures(one: SweptRun) -> set[str]:
    metrics = one.results.metrics
    return {str(name) for name, values in metrics.data_vars.items() if "step" in values.dims}


def _at(dataset: xr.Dataset, steps: Sequence[int]) -> xr.Dataset:
    own = dataset["step"].values
    if np.isin(steps, own).all():
        return dataset.sel(step=list(steps))
    return dataset.interp(step=list(steps), method="linear").assign_coords(step=list(steps))


def _described(value: list[int] | int) -> str:
    if isinstance(value, int):
        return f"{value} steps"
    if len(value) <= 6:
        return "steps " + ", ".join(map(str, value))
    return f"{len(value)} steps from {value[0]} to {value[-1]}"
