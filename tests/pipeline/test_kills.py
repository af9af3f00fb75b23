"""Commands that are killed go on to what an undisturbed run gives; `benchmarks/kill.py` does this on a larger scale."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_kills_of_a_sweep():
    """A sweep that is killed several times, at operations on files and at random times, gives the same numbers."""
    command = [sys.executable, "-m", "benchmarks.kill", "--commands=checkpoint-sweep", "--seconds=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = re.search(r"checkpoint-sweep: (\d+) kills in 1 trials, 0 defects", done.stdout)
    assert kills and int(kills[1]) >= 1, done.stdout


def test_moment_of_a_kill(tmp_path):
    """A process is killed just before its n-th change in a folder: opening a file to write, renaming, removing."""
    code = """
        import os, sys
        from pathlib import Path
        from benchmarks.kill import Counter
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
