"""Commands that are killed go on to what an undisturbed run gives; `benchmarks/kill.py` does this on a larger scale."""

import os
import random
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from benchmarks.killing.journal import Journal
from benchmarks.killing.trials import Trial, Trials

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["checkpoint-sweep", "pipeline"])
def test_kills(name):
    """A command that is killed several times, at operations on files and at random times, gives the same numbers."""
    command = [sys.executable, "-m", "benchmarks.kill", f"--commands={name}", "--trials=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = re.search(rf"{name}: (\d+) kills in 1 trials, 0 defects", done.stdout)
    assert kills and int(kills[1]) >= 1, done.stdout


def test_trial_made_again(tmp_path):
    """The same seed and number have the same moments, and others have others; a journal goes on where it ended."""

    def moments(seed, number):
        trials = object.__new__(Trials)
        trials._operations, trials._seconds = 100, 2.0
        chance = random.Random(f"{seed}/train/{number}")
        return [trials._moment(chance, at_an_operation=attempt % 2 == 0) for attempt in range(6)]

    assert moments(1, 3) == moments(1, 3) and len({str(moments(seed, n)) for seed in (1, 2) for n in range(5)}) == 10
    for operation, time in zip(moments(1, 3)[::2], moments(1, 3)[1::2], strict=True):
        assert 1 <= operation.operation <= 100 and operation.seconds is None
        assert 0.2 <= time.seconds <= 2.0 and time.operation is None
    journal = Journal(tmp_path / "journal.jsonl")
    journal.add(Trial("train", 1, 0, ["before operation 3"], 0.0, [], 1.0, "2026-01-01"))
    journal.add(Trial("train", 2, 0, [], 0.0, ["left a"], 1.0, "2026-01-01"))
    again = Journal(tmp_path / "journal.jsonl")
    assert again.trials == journal.trials and [trial.kills for trial in again.of("train", 1)] == [
        ["before operation 3"]
    ]


def test_moment_of_a_kill(tmp_path):
    """A process is killed just before its n-th change in a folder: opening a file to write, renaming, removing."""
    code = """
        import os, sys
        from pathlib import Path
        from benchmarks.killing.children import Counter
        folder, counter = Path(sys.argv[1]), Counter()
        def work():
            (folder.parent / "elsewhere").write_text("no matter")
            (folder / "a").write_text("1")
            (folder / "a").read_text()
            (folder / "a").rename(folder / "b")
            (folder / "b").unlink()
        for kill_at in (1, 2, 3, 4):
            child = os.fork()
            if not child:
                counter.operations = 0
                counter.watch(folder, kill_at)
                work()
                os._exit(0)
            _, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status), counter.operations, sorted(os.listdir(folder)))
    """
    (tmp_path / "folder").mkdir()
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "folder")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.stdout.splitlines() == ["-9 1 []", "-9 2 ['a']", "-9 3 ['b']", "0 3 []"], done.stdout + done.stderr
