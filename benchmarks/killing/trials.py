"""Kills a command again and again until it ends by itself, and judges what it leaves."""

from __future__ import annotations

import dataclasses
import datetime
import math
import random
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks.killing.children import NEVER, Attempt, Counter, Moment, in_child, run_command
from benchmarks.killing.victims import Victim
from kvjax.artifacts.differences import Difference, between_arrays, between_documents, largest

_KILLS_OF_A_TRIAL = 20  # before the command is let go on to its end
_SOONEST = 0.1  # of the undisturbed command's time
# Relative. A sweep that was killed before it stored how two checkpoints differ forms their states again, and may
# compare them in the other order: linear CKA then rounds differently.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class Trial:
    """A command that was killed until it ended by itself.

    Attributes:
      command: its name.
      seed, number: what its moments follow from.
      kills: each moment, in words, as it came.
      largest: the largest relative difference of a number from the undisturbed command's.
      defects: what went wrong.
      seconds: it took.
      date: when it ended.
    """

    command: str
    seed: int
    number: int
    kills: list[str]
    largest: float
    defects: list[str]
    seconds: float
    date: str


class Trials:
    """Makes trials of one command.

    Args:
      name: of the command.
      victim: how it is called, and which numbers it gives.
      start: a folder as the command finds it; each trial copies it.
      scratch: where trials work.
      seed: of the moments.

    Attributes:
      undisturbed: a folder in which the command ran once, to its end.

    Raises:
      RuntimeError: the command fails without a kill.
    """

    def __init__(self, name: str, victim: Victim, start: Path, scratch: Path, seed: int):
        self._name, self._victim, self._start, self._scratch, self._seed = name, victim, start, scratch, seed
        self._counter = Counter()
        self.undisturbed = scratch / f"{name}_undisturbed"
        shutil.copytree(start, self.undisturbed)
        compiling = self._run(self.undisturbed)
        if compiling.status:
            raise RuntimeError(self.undisturbed.with_suffix(".log").read_text())
        self._operations = compiling.operations
        self._numbers, self._files = self._read(self.undisturbed), _files(self.undisturbed)
        assert self._numbers, f"{name} gave no numbers to compare"
        warm = self._fresh(f"{name}_warm")
        self._seconds = self._run(warm).seconds  # with what the first one compiled
        shutil.rmtree(warm)

    def make(self, number: int) -> Trial:
        """Makes the trial of a number; the same one has the same moments, in operations and in shares of the time."""
        chance, begun = random.Random(f"{self._seed}/{self._name}/{number}"), time.monotonic()
        folder, kills = self._fresh("trial"), []
        for attempt in range(_KILLS_OF_A_TRIAL + 1):
            moment = self._moment(chance, at_an_operation=attempt % 2 == 0) if attempt < _KILLS_OF_A_TRIAL else NEVER
            tried = self._run(folder, moment)
            if not tried.killed:
                break
            kills.append(_described(moment, tried))
        difference, defects = Difference(), []
        if tried.status:
            lines = folder.with_suffix(".log").read_text(errors="replace").splitlines()
            defects.append(f"status {tried.status} after a kill: {' '.join(lines[-3:])}")
        else:
            difference = self._difference(folder)
            if difference.size > _ROUNDING:
                defects.append(f"{difference.where} differs by {difference.size:.1e}")
            if other := sorted(_files(folder) ^ self._files):
                defects.append(f"left or missing: {', '.join(other)}")
        now, seconds = datetime.datetime.now(datetime.UTC).date().isoformat(), round(time.monotonic() - begun, 1)
        return Trial(self._name, self._seed, number, kills, difference.size, defects, seconds, now)

    def _fresh(self, name: str) -> Path:
        folder = self._scratch / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".log").unlink(missing_ok=True)
        return shutil.copytree(self._start, folder)

    def _run(self, folder: Path, moment: Moment = NEVER) -> Attempt:
        return run_command(self._victim.arguments(folder), folder, self._counter, moment)

    def _moment(self, chance: random.Random, *, at_an_operation: bool) -> Moment:
        """Draws a moment, early ones more often: a command goes on from where it was, and has less and less to do."""
        if at_an_operation:
            return Moment(operation=math.ceil(self._operations ** chance.random()))
        return Moment(seconds=self._seconds * _SOONEST ** chance.random())

    def _read(self, folder: Path) -> dict[str, Any]:
        return in_child(lambda: self._victim.numbers(folder), folder.with_suffix(".numbers"))

    def _difference(self, folder: Path) -> Difference:
        now = self._read(folder)
        if now.keys() != self._numbers.keys():
            return Difference(math.inf, ", ".join(sorted(now.keys() ^ self._numbers.keys())))
        return largest(_between(before, now[name], name) for name, before in self._numbers.items())


def _between(before: Any, now: Any, name: str) -> Difference:
    arrays = isinstance(before, dict) and any(hasattr(value, "shape") for value in before.values())
    return (between_arrays if arrays else between_documents)(before, now, where=name)


def _files(folder: Path) -> set[str]:
    """Names every file below a folder, and every partial one in the folders beside it that commands write into.

    Which parts a store of parameters consists of depends on how many checkpoints were converted at once.
    """
    beside = [folder.parent / "tmp", folder.parent / "cache"]
    partial = {str(path.relative_to(folder.parent)) for one in beside for path in one.rglob(".*.kvjax-partial*")}
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {file for file in files if "/converted/part_" not in file} | partial


def _described(moment: Moment, tried: Attempt) -> str:
    if moment.seconds is None:
        return f"before operation {tried.operations}"
    return f"after {tried.seconds:.2f} s of work, {tried.operations} operations"
