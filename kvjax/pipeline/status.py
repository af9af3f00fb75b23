"""Whether a run is ready for circuit work: four conditions, each with its reason and the command that meets it."""

from __future__ import annotations

import dataclasses

from kvjax.artifacts.find_runs import find_run_dirs
from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import unusable
from kvjax.pipeline.current import Current
from kvjax.pipeline.progress import Progress, no_progress
from kvjax.pipeline.settings import Runs
from kvjax.pipeline.story import StoryState, story_state
from kvjax.pipeline.sweep_state import checkpoints_are_measured, probe_set_is_measured, reference_is_fixed
from kvjax.pipeline.windows import windows_are_identified

# In the order in which they are met.
_CONDITIONS = {
    "reference fixed": reference_is_fixed,
    "probe set fixed": probe_set_is_measured,
    "sweep complete": checkpoints_are_measured,
    "windows identified": windows_are_identified,
}


@dataclasses.dataclass(frozen=True)
class Readiness:
    """The four conditions of one run.

    Attributes:
      run: the run.
      conditions: name -> whether it holds, in the order in which they are met.
      told: what happened in it, if that was told.
    """

    run: RunDir
    conditions: dict[str, Current]
    told: StoryState

    @property
    def ready(self) -> bool:
        """Checks whether all conditions hold."""
        return self.failing is None

    @property
    def failing(self) -> str | None:
        """The first condition that does not hold; None if all do."""
        return next((name for name, state in self.conditions.items() if not state.holds), None)

    @property
    def next_command(self) -> str | None:
        """The command that meets the first failing condition; None if all hold, or no command can meet it."""
        return self.conditions[self.failing].command if self.failing else None


def readiness(run: RunDir) -> Readiness:
    """Checks the conditions for circuit work on a run; only reads."""
    return Readiness(run, {name: check(run) for name, check in _CONDITIONS.items()}, story_state(run))


def status(runs: Runs, progress: Progress = no_progress) -> list[Readiness]:
    """Checks the conditions for circuit work on runs.

    Raises:
      InputError: a run cannot be opened.
    """
    found, states = find_run_dirs(runs.run_dirs), []
    with progress(len(found), "runs") as advance:
        for run in found:
            states.append(readiness(run))
            advance(1)
    return states


def check_all_ready(states: list[Readiness]) -> None:
    """Refuses runs of which one is not ready.

    Raises:
      InputError: a condition fails; the message names the first.
    """
    for state in states:
        if state.failing is not None:
            raise unusable(state.run.path, state.failing, state.conditions[state.failing].reason)
