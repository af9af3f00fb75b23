"""Kills commands at random moments, lets them go on, and compares what they give with an undisturbed run.

    python -m benchmarks.kill
    python -m benchmarks.kill --commands=train,convert --kills=100 --journal=kills.jsonl    # stopped, it goes on there
    python -m benchmarks.kill --commands=train --seed=1 --first=17 --trials=1               # one trial again
    python -m benchmarks.kill --journal=kills.jsonl --kills=0 --record                      # writes down what was done

A command runs on a tiny run, with programs that were compiled before. Every other kill comes just before a random one
of its operations on files (opened to be written, renamed, removed, made), the others at a random time. A killed command
is started again, as a person would, and killed again, until it ends by itself. Then every number is compared with the
undisturbed run's, and the same files must be there, and no partial one. Ends with status 1 if a number differs by more
than rounding, a command fails, or something is left.

A trial's moments follow from `seed` and its number. Those before an operation come again exactly. Those at a time are
shares of the processors' time that the undisturbed command uses, and come again nearly.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
import warnings
from pathlib import Path

from absl import app, flags, logging

from benchmarks.killing.children import preload
from benchmarks.killing.journal import Journal
from benchmarks.killing.start import make_start, starts
from benchmarks.killing.trials import Trials
from benchmarks.killing.victims import VICTIMS
from kvjax.devices import CACHE_VARIABLE

FLAGS = flags.FLAGS
flags.DEFINE_list("commands", list(VICTIMS), "Commands to kill.")
flags.DEFINE_integer("kills", 100, "Kills of each command after which no other trial is begun.", lower_bound=0)
flags.DEFINE_integer("trials", None, "Trials of each command, whatever the number of kills.", lower_bound=1)
flags.DEFINE_float("seconds", None, "Time for each command; a trial that has begun is ended.", lower_bound=0.0)
flags.DEFINE_integer("seed", 1, "Seed of the moments.")
flags.DEFINE_integer("first", None, "Number of the first trial; by default the one after those in the journal.")
flags.DEFINE_string("journal", None, "File that trials are added to, and that a stopped series goes on from.")
flags.DEFINE_bool("record", False, "Write the counts to benchmarks/results/ and docs/reliability.md.")


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.ERROR)
    warnings.simplefilter("ignore")  # JAX warns of every fork; nothing has started a thread
    journal = Journal(None if FLAGS.journal is None else Path(FLAGS.journal))
    left = [name for name in FLAGS.commands if not _enough(journal, name)]
    if left:
        with tempfile.TemporaryDirectory() as scratch:
            _kill(left, journal, Path(scratch))
    for name in FLAGS.commands:
        trials = journal.of(name, FLAGS.seed)
        kills, defects = (sum(len(getattr(one, what)) for one in trials) for what in ("kills", "defects"))
        print(f"{name}: {kills} kills in {len(trials)} trials, {defects} defects", flush=True)
    if FLAGS.record:
        from benchmarks.killing.record import record  # starts JAX, so not before the forks

        record(journal, seed=FLAGS.seed)
    if any(trial.defects for trial in journal.trials):
        raise SystemExit(1)


def _kill(commands: list[str], journal: Journal, scratch: Path) -> None:
    """Makes trials of commands in a folder, and adds them to the journal."""
    (scratch / "tmp").mkdir()
    os.environ |= {"TMPDIR": str(scratch / "tmp"), CACHE_VARIABLE: str(scratch / "cache")}
    tempfile.tempdir = None
    preload()
    made: dict[str, Trials] = {}

    def trials_of(command: str, start: Path) -> Trials:
        if command not in made:
            made[command] = Trials(command, VICTIMS[command], start, scratch, FLAGS.seed)
        return made[command]

    start_of = starts(make_start(scratch), lambda command, start: trials_of(command, start).undisturbed)
    for command in commands:
        trials = trials_of(command, start_of(command))
        done = [trial.number for trial in journal.of(command, FLAGS.seed)]
        first = FLAGS.first if FLAGS.first is not None else max(done, default=-1) + 1
        end = time.monotonic() + (FLAGS.seconds if FLAGS.seconds is not None else float("inf"))
        for number in itertools.count(first):
            trial = trials.make(number)
            journal.add(trial)
            for defect in trial.defects:
                print(f"{command}, trial {number}: {defect}\n    killed {'; '.join(trial.kills)}", flush=True)
            if time.monotonic() > end or _enough(journal, command, made=number + 1 - first):
                break


def _enough(journal: Journal, command: str, made: int = 0) -> bool:
    """Checks whether a command was killed as often as asked for, or in as many trials."""
    if FLAGS.trials is not None:
        return made >= FLAGS.trials
    return sum(len(trial.kills) for trial in journal.of(command, FLAGS.seed)) >= FLAGS.kills


if __name__ == "__main__":
    app.run(main)
