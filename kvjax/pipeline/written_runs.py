"""Runs opened for a command that writes results: each is locked until the command is done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from kvjax.artifacts.run_dir import RunDir, find_run_dirs
from kvjax.artifacts.run_lock import hold
from kvjax.pipeline.settings import ResultSettings, Runs


@contextlib.contextmanager
def open_to_write(runs: Runs, results: ResultSettings) -> Iterator[list[RunDir]]:
    """Opens runs and keeps other commands from writing their results until the block ends.

    Raises:
      InputError: a run cannot be opened, its results cannot be written, or another command writes them.
    """
    found = find_run_dirs(runs.run_dirs)
    with contextlib.ExitStack() as held:
        # In one order for all commands: two that wait for each other would wait for ever.
        for run in sorted(found, key=lambda run: run.analysis.resolve()):
            held.enter_context(hold(run.layout.analysis_lock, run.path, wait=results.wait))
        yield found
