"""Whether a run's sweep is of the checkpoints, probe set and reference that the run has."""

from __future__ import annotations

from typing import Any

from kvjax.artifacts.files import read_json
from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import InputError, command
from kvjax.execution.inputs import result_file
from kvjax.pipeline.current import Current
from kvjax.pipeline.probe_set import probe_set_is_current
from kvjax.task.probe_set import frozen_manifest
from kvjax.windows.run import sweep_identity


def sweep_is_current(run: RunDir) -> Current:
    """Says whether every checkpoint of a run is measured, on the probe set that the run has."""
    for state in (probe_set_is_current(run), probe_set_is_measured(run), checkpoints_are_measured(run)):
        if not state.holds:
            return state
    return state


def reference_is_fixed(run: RunDir) -> Current:
    """Says whether a run's sweep names a reference checkpoint that the run has and the sweep could use."""
    try:
        sweep_identity(run)
        record = read_json(run.layout.sweep)
    except InputError as error:
        return Current(False, str(error), _rerun(run))
    name, last = record.get("reference"), max(run.checkpoints, default=None)
    if name is None:
        reason = f"no reference checkpoint is named, and the run is unfinished ({last} of {run.config.num_steps} steps)"
        return Current(False, reason, _rerun(run, reference=last) if last is not None else None)
    try:
        _, file = result_file(run, str(name))
    except InputError:
        return Current(False, f"the reference {name} is no longer in the run's checkpoints")
    if (why := _refused(record).get(file.name)) is not None:
        return Current(False, f"the reference {name} could not be used: {why}", _rerun(run))
    return Current(True, f"the reference is {name}")


def probe_set_is_measured(run: RunDir) -> Current:
    """Says whether a run's sweep was made on the probe set that the run has."""
    state = probe_set_is_current(run)
    if not state.holds:
        return state
    try:
        measured = sweep_identity(run)["probe_set_sha256"]
    except InputError:
        return Current(False, "nothing has been measured on the probe set", _rerun(run))
    content = frozen_manifest(run.layout.probe_set).content_sha256
    if content != measured:
        reason = f"the sweep was made on another probe set ({measured[:12]}) than the one installed ({content[:12]})"
        return Current(False, reason, _rerun(run, overwrite=True))
    return state


def checkpoints_are_measured(run: RunDir) -> Current:
    """Says whether a run's sweep has measured the checkpoints that the run has."""
    try:
        measured = set(sweep_identity(run)["steps"])
    except InputError as error:
        return Current(False, str(error), _rerun(run))
    missing = [step for step in run.checkpoints if step not in measured]
    gone = sorted(measured - set(run.checkpoints))
    reached, end = max(run.checkpoints, default=0), run.config.num_steps
    training = "" if run.complete else f"; training itself has reached {reached} of {end} steps"
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        reason = f"{len(missing)} of {len(run.checkpoints)} checkpoints are not measured (steps {shown}){training}"
        return Current(False, reason, _rerun(run))
    if gone:
        return Current(False, f"{len(gone)} measured checkpoints are no longer in the run (from step {gone[0]})")
    return Current(True, f"all {len(run.checkpoints)} checkpoints are measured{training}")


def _rerun(run: RunDir, **flags: Any) -> str:
    return command("checkpoint-sweep", run_dirs=[run.path], **flags)


def _refused(record: dict[str, Any]) -> dict[str, str]:
    refused = record.get("refused")
    return refused if isinstance(refused, dict) else {}
