"""Whether a run's sweep is of the checkpoints, probe set and reference that the run has, with its files unchanged.

Every checkpoint and table is hashed again, because a replaced or truncated file keeps its name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvjax.artifacts.checkpoint_sums import ResultStore
from kvjax.artifacts.layout import step_name
from kvjax.artifacts.results import RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.sweep_schema import Sweep, read_sweep
from kvjax.errors import InputError, command
from kvjax.execution.inputs import result_file
from kvjax.pipeline.current import Current
from kvjax.pipeline.probe_set import probe_set_is_current
from kvjax.sweeps.settings import SweepSettings, default_ranking
from kvjax.task.probe_set import frozen_manifest


def sweep_is_current(run: RunDir, benchmark_dir: Path | None = None) -> Current:
    """Says whether every checkpoint of a run is measured, on the probe set that the run has.

    Args:
      run: the run.
      benchmark_dir: the benchmark that the probe set is from; by default the run's own.
    """
    for state in (probe_set_is_measured(run, benchmark_dir), checkpoints_are_measured(run)):
        if not state.holds:
            return state
    return state


def reference_is_fixed(run: RunDir) -> Current:
    """Says whether a run's sweep names a reference checkpoint that the run has and the sweep could use."""
    try:
        sweep = read_sweep(run.layout.sweep)
    except InputError as error:
        return Current(False, str(error), _rerun(run))
    name, last = sweep.reference, max(run.checkpoints, default=None)
    if name is None:
        reason = f"no reference checkpoint is named, and the run is unfinished ({last} of {run.planned_steps} steps)"
        return Current(False, reason, _rerun(run, sweep, reference=last) if last is not None else None)
    try:
        _, file = result_file(run, name)
    except InputError:
        return Current(False, f"the reference {name} is no longer in the run's checkpoints")
    if (why := sweep.refused.get(file.name)) is not None:
        return Current(False, f"the reference {name} could not be used: {why}", _rerun(run, sweep))
    if sweep.reference_given == "final" and not run.complete:
        reason = (
            f"the reference {name} is the last checkpoint of an unfinished run ({last} of {run.planned_steps} steps)"
        )
        return Current(False, reason, _rerun(run, sweep, reference=last))
    return Current(True, f"the reference is {name}")


def probe_set_is_measured(run: RunDir, benchmark_dir: Path | None = None) -> Current:
    """Says whether a run's sweep was made on the probe set that the run has; see `sweep_is_current`."""
    state = probe_set_is_current(run, benchmark_dir)
    if not state.holds:
        return state
    try:
        sweep = read_sweep(run.layout.sweep)
    except InputError:
        return Current(False, "nothing has been measured on the probe set", _rerun(run))
    content, measured = frozen_manifest(run.layout.probe_set).content_sha256, sweep.probe_set.content_sha256
    if content != measured:
        reason = f"the sweep was made on another probe set ({measured[:12]}) than the one installed ({content[:12]})"
        return Current(False, reason, _rerun(run, sweep, overwrite=True))
    return state


def checkpoints_are_measured(run: RunDir) -> Current:
    """Says whether a run's sweep has measured the checkpoints that the run has, and its files are as it wrote them."""
    results = RunResults(run)
    try:
        sweep = results.sweep
    except InputError as error:
        return Current(False, str(error), _rerun(run))
    measured = {checkpoint.step for checkpoint in sweep.checkpoints}
    missing = [step for step in run.checkpoints if step not in measured]
    gone = sorted(measured - set(run.checkpoints))
    reached, end = max(run.checkpoints, default=0), run.planned_steps
    training = "" if run.complete else f"; training itself has reached {reached} of {end} steps"
    if missing:
        reason = f"{len(missing)} of {len(run.checkpoints)} checkpoints are not measured ({_listed(missing)}){training}"
        return Current(False, reason, _rerun(run, sweep))
    if gone:
        return Current(False, f"{len(gone)} measured checkpoints are no longer in the run (from step {gone[0]})")
    if (changed := _changed_since(results, sweep)) is not None:
        return changed
    noted = "".join(f"; {found.reason}" for found in sweep.breaks)
    if sweep.vouched is None:
        noted += "; no recorded accuracy vouches for the architecture"
    elif sweep.vouched.differs is not None:
        noted += f"; {sweep.vouched.differs}"
    return Current(True, f"all {len(run.checkpoints)} checkpoints are measured{training}{noted}")


def _changed_since(results: RunResults, sweep: Sweep) -> Current | None:
    """Finds which file differs from what the sweep recorded; None if all are the same."""
    run = results.run
    recorded = {checkpoint.step: checkpoint.sha256 for checkpoint in sweep.checkpoints}
    try:
        hashes = results.checkpoint_hashes()
        changed = [step for step, sha256 in hashes.items() if sha256 != recorded[step]]
        if changed:
            reason = f"{_counted(changed)} changed since being measured ({_listed(changed)})"
            return Current(False, reason, _rerun(run, sweep))
        sums = ResultStore(run.layout.measured, sweep.identity)
        lost = [step for step, sha256 in hashes.items() if not sums.holds(step_name(step), sha256)]
        if lost:
            reason = f"{run.layout.measured} lacks the sums of {_counted(lost)} ({_listed(lost)})"
            return Current(False, reason, _rerun(run, sweep))
        results.check_tables()
    except InputError as error:
        return Current(False, str(error), _rerun(run, sweep))
    if sweep.converted and not run.layout.converted.is_dir():
        reason = f"the converted parameters are missing from {run.layout.converted}"
        return Current(False, reason, command("convert", run_dirs=[run.path]))
    return None


def _rerun(run: RunDir, sweep: Sweep | None = None, **flags: Any) -> str:
    """Writes the command that sweeps a run again, with the settings of its sweep where they are not the defaults."""
    if sweep is not None:
        if sweep.reference_given != "final":
            flags.setdefault("reference", sweep.reference_given)
        chosen = {name: sweep.identity.get(name) for name in ("precision", "ablations", "resample_draws", "probe")}
        defaults = SweepSettings()
        as_chosen = {name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()}
        flags |= {name: chosen[name] for name, value in as_chosen.items() if value != getattr(defaults, name)}
        if sweep.ranked_by != default_ranking(sweep.identity.get("ablations") or defaults.ablations):
            flags["rank_by"] = sweep.ranked_by
    return command("checkpoint-sweep", run_dirs=[run.path], **flags)


def _counted(steps: list[int]) -> str:
    return f"{len(steps)} checkpoint{'s' if len(steps) > 1 else ''}"


def _listed(steps: list[int]) -> str:
    """Writes the first five of some steps."""
    return f"steps {', '.join(map(str, steps[:5]))}{', …' if len(steps) > 5 else ''}"
