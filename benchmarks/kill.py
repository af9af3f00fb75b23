"""Kills commands at random moments, lets them go on, and compares what they give with an undisturbed run.

    python -m benchmarks.kill [--seconds=90] [--commands=train,checkpoint-sweep] [--record]

A command runs on a tiny run. Every other kill comes just before a random one of its operations on files (opened to be
written, renamed, removed, made), the others at a random time. A killed command is started again, as a person would,
and killed again, until it ends by itself. Then every number is compared with the undisturbed run's, and no partial file
may be left. Ends with status 1 if a number differs, a command fails, or something is left.
"""

from __future__ import annotations

import dataclasses
import importlib
import mmap
import os
import pickle
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from benchmarks.fuzzing.material import benchmark_config, train_config
from benchmarks.killing.victims import BENCHMARK, VICTIMS, Victim
from kvjax.artifacts.differences import Difference, between_arrays, between_documents, largest
from kvjax.devices import CACHE_VARIABLE

FLAGS = flags.FLAGS
flags.DEFINE_list("commands", None, "Commands to kill; all of them by default.")
flags.DEFINE_float("seconds", 90.0, "Time for each command; what has begun is ended.", lower_bound=0.0)
flags.DEFINE_integer("kills", 1_000_000, "Kills of each command after which no other trial is begun.", lower_bound=1)
flags.DEFINE_integer("seed", 1, "Seed of the moments.")
flags.DEFINE_bool("record", False, "Write the counts to benchmarks/results/ and docs/reliability.md.")

_KILLS_OF_A_TRIAL = 8  # before the command is let go on to its end
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}


@dataclasses.dataclass
class Count:
    """What happened to one command.

    Attributes:
      kills, trials: how many; a trial ends when the command ends by itself.
      largest: the largest relative difference of a number.
      defects: what went wrong.
    """

    kills: int = 0
    trials: int = 0
    largest: float = 0.0
    defects: list[str] = dataclasses.field(default_factory=list)


class Counter:
    """Counts a child's operations on files below a folder, in memory that parent and child share."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 8)

    @property
    def operations(self) -> int:
        return struct.unpack("q", self._shared[:8])[0]

    @operations.setter
    def operations(self, number: int) -> None:
        self._shared[:8] = struct.pack("q", number)

    def watch(self, root: Path, kill_at: int | None) -> None:
        """Counts from now on in this process, and kills it before the operation of a number."""
        below = str(root)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in _CHANGES:
                pass
            elif event != "open" or not (arguments[2] or 0) & _WRITING:
                return
            if isinstance(arguments[0], str | os.PathLike) and str(arguments[0]).startswith(below):
                self.operations += 1
                if self.operations == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


def run_command(
    arguments: Sequence[str], folder: Path, counter: Counter, *, kill_at: int | None = None, after: float | None = None
) -> int:
    """Runs a command in a forked process; returns its status, negative if it was killed.

    Args:
      arguments: of the command.
      folder: that it works in; what it prints goes into `log` beside it.
      counter: of its operations.
      kill_at: kills it before this operation.
      after: kills it after so many seconds.
    """
    counter.operations = 0
    child = os.fork()
    if not child:
        status = 70
        try:
            log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            counter.watch(folder, kill_at)
            from kvjax.commands.main import main

            status = main(list(arguments))
        finally:
            os._exit(status)
    deadline = time.monotonic() + (after if after is not None else 600)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGKILL
        time.sleep(0.002)


def read_numbers(victim: Victim, folder: Path) -> dict[str, Any]:
    """Reads the numbers of a folder in a forked process, for libraries that read them start threads."""
    path = folder.with_suffix(".numbers")
    child = os.fork()
    if not child:
        try:
            path.write_bytes(pickle.dumps(victim.numbers(folder)))
            os._exit(0)
        finally:
            os._exit(70)
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"the numbers of {folder} cannot be read")
    return pickle.loads(path.read_bytes())  # our own child wrote it


def preload() -> None:
    """Imports what commands need, so that a forked process starts at once; none of it starts a thread of its own."""
    for name in ("sweep", "train", "convert", "interventions", "pipeline", "factor_screen", "text"):
        importlib.import_module(f"kvjax.pipeline.{name}")
    for name in ("kvjax.sweeps.tables", "kvjax.report.text", "kvjax.converters.convert", "orbax.checkpoint", "tqdm"):
        importlib.import_module(name)


class Trials:
    """Kills one command in trials, and counts what comes of it.

    Args:
      name: of the command.
      start: a folder as the command finds it; each trial copies it.
      scratch: where trials work.
    """

    def __init__(self, name: str, start: Path, scratch: Path):
        self._name, self._victim, self._start, self._scratch = name, VICTIMS[name], start, scratch
        self._counter, self.count = Counter(), Count()
        self.undisturbed = scratch / f"{name}_undisturbed"
        shutil.copytree(start, self.undisturbed)
        begun = time.monotonic()
        self._must(self.undisturbed)
        self._operations, self._seconds = self._counter.operations, time.monotonic() - begun
        self._numbers = read_numbers(self._victim, self.undisturbed)
        assert self._numbers, f"{name} gave no numbers to compare"

    def __iter__(self) -> Iterator[Count]:
        """Makes one trial after another, and gives the count so far after each."""
        while True:
            yield self._trial(random.Random(f"{FLAGS.seed}/{self._name}/{self.count.trials}"))

    def _trial(self, chance: random.Random) -> Count:
        folder, count = self._scratch / "trial", self.count
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".log").unlink(missing_ok=True)
        shutil.copytree(self._start, folder)
        status, begun = -1, 0.0
        for attempt in range(_KILLS_OF_A_TRIAL + 1):
            moment: dict[str, Any] = {}
            if attempt < _KILLS_OF_A_TRIAL:
                at_an_operation = {"kill_at": chance.randint(1, max(1, self._operations // 2))}
                moment = {"after": chance.uniform(0.0, self._seconds)} if attempt % 2 else at_an_operation
            begun = time.monotonic()
            status = run_command(self._victim.arguments(folder), folder, self._counter, **moment)
            if status != -signal.SIGKILL:
                break
            count.kills += 1
        count.trials += 1
        self._seconds = min(self._seconds, time.monotonic() - begun)  # the undisturbed call compiled as well
        if status != 0:
            lines = folder.with_suffix(".log").read_text(errors="replace").splitlines()
            count.defects.append(f"trial {count.trials}: status {status} after a kill: {' '.join(lines[-3:])}")
            return count
        found = self._difference(folder)
        count.largest = max(count.largest, found.size)
        if found.size > 0:
            count.defects.append(f"trial {count.trials}: {found.where} differs by {found.size:.1e}")
        left = [str(path.relative_to(folder)) for path in folder.rglob("*.kvjax-partial*")]
        if left:
            count.defects.append(f"trial {count.trials}: left {', '.join(left)}")
        return count

    def _difference(self, folder: Path) -> Difference:
        now = read_numbers(self._victim, folder)
        if now.keys() != self._numbers.keys():
            return Difference(float("inf"), ", ".join(sorted(now.keys() ^ self._numbers.keys())))
        return largest(
            (between_arrays if isinstance(before, dict) else between_documents)(before, now[name], where=name)
            for name, before in self._numbers.items()
        )

    def _must(self, folder: Path) -> None:
        if run_command(self._victim.arguments(folder), folder, self._counter):
            raise SystemExit(folder.with_suffix(".log").read_text())


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.ERROR)
    warnings.simplefilter("ignore")  # JAX warns of every fork; nothing has started a thread
    names = FLAGS.commands or list(VICTIMS)
    counts: dict[str, Count] = {}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        (scratch / "tmp").mkdir()
        os.environ |= {"TMPDIR": str(scratch / "tmp"), CACHE_VARIABLE: str(scratch / "cache")}
        tempfile.tempdir = None
        preload()
        started = _start(scratch)
        for command in names:
            trials = Trials(command, started(command), scratch)
            end = time.monotonic() + FLAGS.seconds
            for count in trials:
                if time.monotonic() > end or count.kills >= FLAGS.kills:
                    break
            counts[command] = trials.count
            print(f"{command}: {_described(trials.count)}", flush=True)
            if FLAGS.record:
                _record(counts, time.monotonic() - begun)
    if any(count.defects for count in counts.values()):
        raise SystemExit(1)


def _record(counts: dict[str, Count], seconds: float) -> None:
    """Records what is known so far, in a forked process, for that starts JAX."""
    child = os.fork()
    if not child:
        try:
            from benchmarks.killing.record import record

            record(
                {name: dataclasses.asdict(count) for name, count in counts.items()}, seed=FLAGS.seed, seconds=seconds
            )
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def _start(scratch: Path) -> Callable[[str], Path]:
    """Makes the configs and the benchmark; returns what makes the folder that a command starts from."""
    import json

    configs = scratch / "configs"
    configs.mkdir()
    screen = {
        "name": "tiny",
        "train_config": str(configs / "train.json"),
        "benchmark_config": str(configs / "benchmark.json"),
        "seeds": [3],
        "output_dir": "unused",
        "factors": [
            {"name": "heads", "base_label": "many", "values": [{"label": "one", "train": {"model.n_heads": 1}}]}
        ],
    }
    documents = {"benchmark": benchmark_config(), "screen": screen}
    documents["train"] = train_config() | {"benchmark_dir": str(configs / BENCHMARK)}
    for name, document in documents.items():
        (configs / f"{name}.json").write_text(json.dumps(document))
    drawing = ["generate-benchmark", f"--config={configs / 'benchmark.json'}", f"--output_dir={configs / BENCHMARK}"]
    if run_command(drawing, scratch / "drawing", Counter()):
        raise SystemExit((scratch / "drawing.log").read_text())
    made: dict[str, Path] = {}

    def folder_for(command: str) -> Path:
        needs = VICTIMS[command].needs
        if needs is None:
            return configs
        if needs not in made:
            made[needs] = Trials(needs, folder_for(needs), scratch / f"for_{command}").undisturbed
        return made[needs]

    return folder_for


def _described(count: Count) -> str:
    defects = "".join(f"\n    {defect}" for defect in count.defects)
    return f"{count.kills} kills in {count.trials} trials, {len(count.defects)} defects{defects}"


if __name__ == "__main__":
    app.run(main)
