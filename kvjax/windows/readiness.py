"""Whether a run is ready for deep circuit work: the four conditions, each with its reason and what to do about it."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from kvjax.artifacts.birth_windows_schema import read_birth_windows
from kvjax.artifacts.files import read_json
from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import InputError
from kvjax.execution.inputs import result_file
from kvjax.task.probe_set import frozen_manifest
from kvjax.windows.run import sweep_identity

REFERENCE, PROBE_SET, SWEEP, WINDOWS = "reference fixed", "probe set fixed", "sweep complete", "windows identified"


@dataclasses.dataclass(frozen=True)
class Condition:
    """One condition for circuit work.

    Attributes:
      name: of the condition.
      holds: whether the run meets it.
      reason: why, in one sentence.
      command: what to run about it; None where it holds, or nothing can be run.
    """

    name: str
    holds: bool
    reason: str
    command: str | None


@dataclasses.dataclass(frozen=True)
class Readiness:
    """The four conditions of one run.

    Attributes:
      run: the run.
      conditions: in the order in which they are met.
    """

    run: RunDir
    conditions: tuple[Condition, ...]

    @property
    def ready(self) -> bool:
        """Whether all of them hold."""
        return all(condition.holds for condition in self.conditions)

    @property
    def next_command(self) -> str | None:
        """What to run next about the first condition that fails; None where all hold, or no command can meet it."""
        failing = [condition for condition in self.conditions if not condition.holds]
        return failing[0].command if failing else None


def readiness(run: RunDir) -> Readiness:
    """Returns which conditions for deep circuit work a run meets."""
    sweep = _sweep(run)
    return Readiness(
        run, (_reference(run, sweep), _probe_set(run, sweep), _sweep_complete(run, sweep), _windows(run, sweep))
    )


def _run_flag(run: RunDir) -> str:
    return f"--run_dirs={shlex.quote(str(run.path))}"


def _sweep_command(run: RunDir, more: str = "") -> str:
    return f"kvjax checkpoint-sweep {_run_flag(run)}{more}"


def _sweep(run: RunDir) -> dict[str, Any] | InputError:
    """Returns the sweep's provenance with the identity windows depend on, or why there is none."""
    try:
        identity = sweep_identity(run)
    except InputError as error:
        return error
    return {**read_json(run.layout.sweep), "measured_on": identity}


def _reference(run: RunDir, sweep: dict[str, Any] | InputError) -> Condition:
    if isinstance(sweep, InputError):
        return Condition(REFERENCE, False, str(sweep), _sweep_command(run))
    name = sweep.get("reference")
    last = max(run.checkpoints, default=None)
    if name is None:
        end = run.config.num_steps
        reason = f"no reference checkpoint is named, and the run is unfinished ({last} of {end} steps)"
        command = _sweep_command(run, f" --reference={last}") if last is not None else None
        return Condition(REFERENCE, False, reason, command)
    try:
        _, file = result_file(run, str(name))
    except InputError:
        return Condition(REFERENCE, False, f"the reference {name} is no longer in the run's checkpoints", None)
    if (why := _refused(sweep).get(file.name)) is not None:
        return Condition(REFERENCE, False, f"the reference {name} could not be used: {why}", _sweep_command(run))
    return Condition(REFERENCE, True, f"the reference is {name}", None)


def _probe_set(run: RunDir, sweep: dict[str, Any] | InputError) -> Condition:
    path = run.layout.probe_set
    if not path.is_file():
        return Condition(PROBE_SET, False, f"{path} does not exist", _sweep_command(run))
    try:
        content = frozen_manifest(path).content_sha256
    except InputError as error:
        return Condition(PROBE_SET, False, str(error), None)
    measured = None if isinstance(sweep, InputError) else sweep["measured_on"]["probe_set_sha256"]
    if measured is None:
        return Condition(PROBE_SET, False, "nothing has been measured on the probe set", _sweep_command(run))
    if content != measured:
        reason = f"the sweep was made on another probe set ({measured[:12]}) than the one installed ({content[:12]})"
        return Condition(PROBE_SET, False, reason, _sweep_command(run, " --overwrite"))
    return Condition(PROBE_SET, True, f"probe set {content[:12]}, unchanged since it was frozen", None)


def _sweep_complete(run: RunDir, sweep: dict[str, Any] | InputError) -> Condition:
    if isinstance(sweep, InputError):
        return Condition(SWEEP, False, str(sweep), _sweep_command(run))
    measured = set(sweep["measured_on"]["steps"])
    missing = [step for step in run.checkpoints if step not in measured]
    gone = sorted(measured - set(run.checkpoints))
    training = "" if run.complete else f"; training itself has reached {max(run.checkpoints, default=0)} of "
    training += "" if run.complete else f"{run.config.num_steps} steps"
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        reason = f"{len(missing)} of {len(run.checkpoints)} checkpoints are not measured (steps {shown}){training}"
        return Condition(SWEEP, False, reason, _sweep_command(run))
    if gone:
        reason = f"{len(gone)} measured checkpoints are no longer in the run (from step {gone[0]})"
        return Condition(SWEEP, False, reason, None)
    return Condition(SWEEP, True, f"all {len(run.checkpoints)} checkpoints are measured{training}", None)


def _windows(run: RunDir, sweep: dict[str, Any] | InputError) -> Condition:
    command = f"kvjax birth-windows {_run_flag(run)}"
    path = run.layout.birth_windows
    if isinstance(sweep, InputError):
        return Condition(WINDOWS, False, "windows are found in a sweep, and there is none", _sweep_command(run))
    if not path.is_file():
        return Condition(WINDOWS, False, f"{path} does not exist", command)
    try:
        found = read_birth_windows(path)
    except InputError as error:
        return Condition(WINDOWS, False, str(error), command)
    if found.measured_on.model_dump() != sweep["measured_on"]:
        return Condition(WINDOWS, False, "the sweep has changed since windows were looked for", command)
    if found.verdict != "windows":
        return Condition(WINDOWS, False, f"the verdict is {found.verdict}: {found.reason}", None)
    centres = ", ".join(str(window.center_step) for window in found.windows)
    return Condition(WINDOWS, True, f"{found.reason}, around step {centres}", None)


def _refused(sweep: dict[str, Any]) -> dict[str, str]:
    refused = sweep.get("refused")
    return refused if isinstance(refused, dict) else {}
