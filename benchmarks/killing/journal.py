"""Keeps trials in a file, so that a long series of them can be stopped, continued and made in parts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from benchmarks.killing.trials import Trial


class Journal:
    """The trials that were made, one JSON document a line; several processes may append to a file.

    Args:
      path: the file; None keeps trials in memory alone.
    """

    def __init__(self, path: Path | None):
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.is_file() else []
        self.trials = [Trial(**json.loads(line)) for line in lines]

    def add(self, trial: Trial) -> None:
        """Keeps a trial."""
        self.trials.append(trial)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(dataclasses.asdict(trial)) + "\n")

    def of(self, command: str, seed: int) -> list[Trial]:
        """Lists the trials of a command and a seed."""
        return [trial for trial in self.trials if (trial.command, trial.seed) == (command, seed)]
