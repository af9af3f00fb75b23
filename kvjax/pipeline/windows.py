"""The stage that finds birth windows."""

from __future__ import annotations

import dataclasses

from kvjax.artifacts.birth_windows_schema import read_birth_windows
from kvjax.artifacts.results import RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.story_schema import Story
from kvjax.artifacts.sweep_schema import read_sweep
from kvjax.config.files import find_config, read_config
from kvjax.config.windows import WindowConfig
from kvjax.errors import InputError, command
from kvjax.pipeline.current import Current
from kvjax.pipeline.progress import Progress, no_progress
from kvjax.pipeline.settings import DEFAULT_RESULTS, ResultSettings, Runs, WindowSettings
from kvjax.pipeline.story import tell_story
from kvjax.pipeline.written_runs import open_to_write
from kvjax.windows.run import WindowsReport, write_windows

_FEW = 16  # runs that are over before a progress bar says anything


@dataclasses.dataclass(frozen=True)
class ToldWindows:
    """The birth windows of a run, and the story told from them."""

    windows: WindowsReport
    story: Story


def find_birth_windows(
    runs: Runs,
    settings: WindowSettings,
    progress: Progress = no_progress,
    results: ResultSettings = DEFAULT_RESULTS,
) -> list[ToldWindows]:
    """Finds the birth windows of runs, tells what happened in them, and writes each run's files.

    Raises:
      InputError: the config cannot be used, or a run has no sweep that can be read. What was written for runs before
        it stays.
    """
    config = read_config(find_config(settings.config, "windows"), WindowConfig)
    with open_to_write(runs, results, needs="checkpoints") as found:
        told, shown = [], progress if len(found) > _FEW else no_progress
        with shown(len(found), "runs") as advance:
            for run in found:
                opened = RunResults(run)
                told.append(ToldWindows(write_windows(opened, config), tell_story(opened)))
                advance(1)
        return told


def windows_are_current(run: RunDir) -> Current:
    """Says whether windows were looked for in the sweep that the run has, whatever the verdict."""
    rerun, path = command("birth-windows", run_dirs=[run.path]), run.layout.birth_windows
    try:
        measured_on = read_sweep(run.layout.sweep).measured_on
    except InputError:
        first = command("checkpoint-sweep", run_dirs=[run.path])
        return Current(False, "windows are found in a sweep, and there is none", first)
    if not path.is_file():
        return Current(False, f"{path} does not exist", rerun)
    try:
        found = read_birth_windows(path)
    except InputError as error:
        return Current(False, str(error), rerun)
    if found.measured_on != measured_on:
        return Current(False, "the sweep has changed since windows were looked for", rerun)
    return Current(True, f"windows were looked for in this sweep: {found.reason}")


def windows_are_identified(run: RunDir) -> Current:
    """Says whether a run has windows of its sweep; no command helps if nothing formed."""
    state = windows_are_current(run)
    if not state.holds:
        return state
    found = read_birth_windows(run.layout.birth_windows)
    if found.verdict != "windows":
        return Current(False, f"the verdict is {found.verdict}: {found.reason}")
    centers = ", ".join(str(window.center_step) for window in found.windows)
    return Current(True, f"{found.reason}, around step {centers}")
