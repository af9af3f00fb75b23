"""Birth windows of a run, from the sweep's files to `analysis/birth_windows.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import xarray as xr

from kvjax.artifacts.birth_windows_schema import MeasuredOn, TrajectoryBreak, write_birth_windows
from kvjax.artifacts.results import RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.tables import SCHEMA_VERSION
from kvjax.config.windows import WindowConfig
from kvjax.errors import unusable
from kvjax.windows.births import births
from kvjax.windows.breaks import Breaks
from kvjax.windows.find_in_run import RunFinding, find_in_run
from kvjax.windows.summary import ramp_entries, verdict_sentence, window_entries
from kvjax.windows.trajectories import component_drops, needed_events, needed_means, run_trajectories


@dataclasses.dataclass(frozen=True)
class WindowsReport:
    """What was found in one run.

    Attributes:
      run: the run.
      document: what was written to its `birth_windows.json`.
      notes: sentences a reader should know.
    """

    run: RunDir
    document: dict[str, Any]
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class _Swept:
    run: RunDir
    means: xr.Dataset
    events: xr.Dataset
    measured_on: MeasuredOn
    ranked_by: str
    breaks: tuple[TrajectoryBreak, ...]
    where_broken: Breaks


def write_windows(run: RunResults, config: WindowConfig) -> WindowsReport:
    """Finds the birth windows of a run and writes its file.

    It works on whatever has been measured, even while the run still trains. What it reads of the results stays read.

    Raises:
      InputError: the run has no sweep, or a sweep that cannot be read.
    """
    swept = _open(run)
    trajectories = run_trajectories(swept.means, swept.events, config, swept.where_broken, ranked_by=swept.ranked_by)
    finding = find_in_run(trajectories, config)
    document = _document(swept, finding, config)
    write_birth_windows(run.run.layout.birth_windows, document)
    return WindowsReport(run.run, document, _notes(swept, finding))


def _open(results: RunResults) -> _Swept:
    run = results.run
    measured_on, means, events, path = results.sweep.measured_on, results.metrics, results.events, run.layout.arrays
    ranked_by = results.sweep.ranked_by
    if missing := sorted(needed_events(ranked_by) - set(events.data_vars)) or sorted(
        needed_means() - set(means.data_vars)
    ):
        raise unusable(path, "the arrays of a sweep (run kvjax checkpoint-sweep again)", f"no {', '.join(missing)}")
    if "num_values" not in means.attrs:  # a sweep of an older version
        raise unusable(path, "the number of values, num_values (run kvjax checkpoint-sweep again)", "none")
    steps = means["step"].values.tolist()
    if steps != measured_on.steps:
        found = f"{len(steps)} steps in the one and {len(measured_on.steps)} in the other"
        raise unusable(path, "the steps of sweep.json (run kvjax checkpoint-sweep again)", found)
    breaks = tuple(results.sweep.breaks)
    where = Breaks.of(steps, breaks)
    kept = [step for step in steps if step not in where.dropped]
    return _Swept(run, means.sel(step=kept), events.sel(step=kept), measured_on, ranked_by, breaks, where)


def _document(one: _Swept, finding: RunFinding, config: WindowConfig) -> dict[str, Any]:
    chance = 1 / one.means.attrs["num_values"]
    components = component_drops(one.events, config, chance=chance, ranked_by=one.ranked_by)
    return {
        "schema_version": SCHEMA_VERSION,
        "run_name": one.run.config.run_name,
        "verdict": finding.verdict,
        "reason": verdict_sentence(finding, config, complete=one.run.complete),
        "complete": one.run.complete,
        "measured_on": one.measured_on.model_dump(),
        "ranked_by": one.ranked_by,
        "config": config.model_dump(mode="json"),
        "births": births(
            finding.trajectories,
            thresholds=_thresholds(one.run),
            config=config,
            complete=one.run.complete,
        ),
        "windows": window_entries(finding, components, config),
        "ramps": ramp_entries(finding),
        "breaks": [found.model_dump() for found in one.breaks],
    }


def _thresholds(run: RunDir) -> Mapping[str, float]:
    return run.config.evaluation.birth_thresholds.model_dump()


def notes_on_changes(run: RunDir) -> list[str]:
    """Says which checkpoint files are others than those that the run's sweep measured."""
    changed = RunResults(run).changed_checkpoints()
    listed = f"{', '.join(map(str, changed[:5]))}{', …' if changed[5:] else ''}"
    windows = "these are windows of the older files; run kvjax checkpoint-sweep and this again"
    counted = f"{len(changed)} checkpoint{'s' if len(changed) > 1 else ''}"
    return [f"{counted} changed since being measured (steps {listed}): {windows}"] if changed else []


def _notes(one: _Swept, finding: RunFinding) -> list[str]:
    notes = []
    missing = [step for step in one.run.checkpoints if step not in set(one.measured_on.steps)]
    if missing:
        notes.append(f"{len(missing)} of the run's checkpoints are not measured yet: run kvjax checkpoint-sweep")
    notes += notes_on_changes(one.run)
    if not one.run.complete:
        last, end = max(one.run.checkpoints, default=0), one.run.planned_steps
        notes.append(
            f"the run is unfinished ({last} of {end} steps): half-rises are provisional, to its last checkpoint, and "
            "windows may yet be added"
        )
    if one.where_broken.dropped:
        notes.append(f"windows leave out {_steps(sorted(one.where_broken.dropped))}")
    for found in one.breaks:
        resting = "" if found.after in one.where_broken.dropped else "; no window rests on that interval"
        notes.append(found.reason + resting)
    if finding.verdict == "no transition" and finding.joining:
        kinds = sorted({finding.trajectories.metrics[shift.metric].kind for shift in finding.joining})
        notes.append(f"shifts in {', '.join(kinds)} alone make no window")
    return notes


def _steps(steps: Sequence[int]) -> str:
    """Writes steps in words, the first eight of many."""
    shown = ", ".join(map(str, steps[:8]))
    return f"step{'s' if len(steps) > 1 else ''} {shown}{', …' if len(steps) > 8 else ''}"
