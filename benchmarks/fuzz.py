"""Fuzzes every reader of files and counts what becomes of damaged inputs.

    python -m benchmarks.fuzz
    python -m benchmarks.fuzz --inputs=2000 --readers='sweep.json,metrics.jsonl'
    python -m benchmarks.fuzz --readers=sweep.json --first=17 --inputs=1 --keep=damaged.json    # one input again

The script makes a small run with all its results and damages one file at a time by seeded mutation: of bytes, of JSON
values, of the document of a `.pt` file. It reads the file in a forked process under limits of time and memory. It exits
with status 1 if there are defects. With `--record` it writes the counts to `benchmarks/results/` and to the table in
`docs/reliability.md`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from absl import app, flags

from benchmarks.fuzzing.guard import Outcome, try_inputs
from benchmarks.fuzzing.reader import Reader, damaged, fingerprint, refusal_problem
from benchmarks.fuzzing.readers import READERS
from kvjax.errors import InputError

FLAGS = flags.FLAGS
flags.DEFINE_integer("inputs", 104_000, "Number of inputs, shared by the readers.", lower_bound=1)
flags.DEFINE_list("readers", sorted(READERS), "Which readers, by the names in docs/reliability.md.")
flags.DEFINE_integer("seed", 1, "Seed of the damage.")
flags.DEFINE_integer("first", 0, "Number of the first input.", lower_bound=0)
flags.DEFINE_string("material", None, "A folder that benchmarks.fuzzing.material has filled; made anew by default.")
flags.DEFINE_string(
    "keep", None, "Try one input without a guard, write its bytes to this file, and show the traceback."
)
flags.DEFINE_integer("processes", os.cpu_count(), "How many processes parse at once.", lower_bound=1)
flags.DEFINE_float("seconds", 20.0, "Limit of one input.", lower_bound=0.1)
flags.DEFINE_float("memory_gb", 1.0, "Resident memory that a process may gain.", lower_bound=0.1)
flags.DEFINE_bool("record", False, "Write the results and the table of docs/reliability.md.")

# Each input ends in one of these; all but the first three are defects.
GOOD = ("refused", "equal", "changed")
DEFECTS = ("accepted damage", "bad refusal", "traceback", "memory", "hang", "killed")


class Workspace:
    """Copies of the sound files, one per process, in which one file at a time is damaged and read.

    Attributes:
      sound: path below the folder -> bytes, of every file.
      readers: those whose files there are.
    """

    def __init__(self, material: Path, folders: Sequence[Path], readers: dict[str, Reader], seed: int):
        self.sound = {str(f.relative_to(material)): f.read_bytes() for f in sorted(material.rglob("*")) if f.is_file()}
        self.readers = {n: r for n, r in readers.items() if all(file in self.sound for file in r.files)}
        self._folders, self._seed = folders, seed
        self._stamps: dict[Path, dict[str, tuple[int, int]]] = {}
        self._values: dict[tuple[str, str], tuple[object, str]] = {}
        for folder in folders:
            folder.mkdir()
            for directory in sorted(path for path in material.rglob("*") if path.is_dir()):
                (folder / directory.relative_to(material)).mkdir()
            self._restore(folder)

    def input(self, name: str, index: int) -> tuple[str, bytes]:
        """Makes a damaged input: the path it is written to, and its bytes."""
        return damaged(self.readers[name], name, index, self._seed, self.sound)

    def trial(self, name: str, index: int, lane: int) -> tuple[str, str]:
        """Reads one damaged input and says what became of it."""
        reader, root = self.readers[name], self._folders[lane]
        path, content = self.input(name, index)
        self._restore(root)
        sound, expected = self._sound_value(name, path, root)
        (root / path).write_bytes(content)
        self._stamps[root].pop(path)
        try:
            value = reader.read(root, root / path)
            if fingerprint(value) == expected:
                return "equal", ""
            if reader.check is None:
                return "accepted damage", "a hash or a checksum covers the file"
            problem = reader.check(value, sound, root / path)
            return ("accepted damage", problem) if problem else ("changed", "")
        except InputError as error:
            problem = refusal_problem(error, reader, root / path) or self._written(root, path)
            return ("bad refusal", problem) if problem else ("refused", "")
        except MemoryError:
            return "memory", ""
        except Exception as error:
            return "traceback", f"{_place(error)}: {type(error).__name__}: {error}"

    def _sound_value(self, name: str, path: str, root: Path) -> tuple[object, str]:
        """Reads the sound file, once in each process; returns the value and its fingerprint."""
        if (name, path) not in self._values:
            value = self.readers[name].read(root, root / path)
            self._values[name, path] = value, fingerprint(value)
            self._restore(root)  # some readers write, as a resume does
        return self._values[name, path]

    def _written(self, root: Path, damaged_path: str) -> str | None:
        """Names a file that was changed although the input was refused; None if there is none."""
        now, before = _stamps(root), self._stamps[root]
        changed = {path for path in now.keys() | before.keys() if now.get(path) != before.get(path)} - {damaged_path}
        return f"{min(changed)} was changed before the refusal" if changed else None

    def _restore(self, root: Path) -> None:
        """Puts back every file that is not as it was, and removes what a reader added."""
        stamps, there = self._stamps.setdefault(root, {}), _stamps(root)
        for path, content in self.sound.items():
            found = there.pop(path, None)
            if found is None or found != stamps.get(path):
                (root / path).write_bytes(content)
                stat = (root / path).stat()
                stamps[path] = stat.st_mtime_ns, stat.st_size
        for path in there:
            (root / path).unlink()


def _stamps(root: Path) -> dict[str, tuple[int, int]]:
    """Lists the files below a folder with time and size."""
    found, folders = {}, [""]
    for folder in folders:
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    folders.append(f"{folder}{entry.name}/")
                else:
                    stat = entry.stat()
                    found[f"{folder}{entry.name}"] = stat.st_mtime_ns, stat.st_size
    return found


def _place(error: BaseException) -> str:
    """Names the innermost line of this project that an error passed through."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "/kvjax/" in f.filename or "converters" in f.filename
    ]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"


@dataclasses.dataclass
class Counts:
    """Outcomes of one reader, and the first few defects."""

    outcomes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    examples: list[Outcome] = dataclasses.field(default_factory=list)

    @property
    def defects(self) -> int:
        """The number of inputs that ended in a defect."""
        return sum(self.outcomes[kind] for kind in DEFECTS)


def fuzz(
    workspace: Workspace, inputs: int, *, first: int, processes: int, seconds: float, memory_gb: float
) -> dict[str, Counts]:
    """Tries inputs of every reader and counts the outcomes."""
    shares = {name: reader.share for name, reader in workspace.readers.items()}
    share = {name: math.ceil(inputs * part / sum(shares.values())) for name, part in shares.items()}
    counts = {name: Counts() for name in share}
    outcomes = try_inputs(
        workspace.trial,
        share,
        lanes=processes,
        seconds=seconds,
        memory_bytes=int(memory_gb * 2**30),
        first=first,
    )
    for outcome in outcomes:
        of_reader = counts[outcome.reader]
        of_reader.outcomes[outcome.kind] += 1
        if outcome.kind in DEFECTS:
            of_reader.examples.append(outcome)
    return counts


def main(argv: list[str]) -> None:
    del argv
    torch.set_num_threads(1)  # before anything forks: PyTorch's threads would not exist in the child
    if unknown := [name for name in FLAGS.readers if name not in READERS]:
        raise app.UsageError(f"expected readers among {', '.join(READERS)}; found {', '.join(unknown)}")
    with tempfile.TemporaryDirectory() as scratch:
        material = Path(FLAGS.material or Path(scratch) / "material")
        if not FLAGS.material:
            print("making the run to damage", flush=True)
            subprocess.run([sys.executable, "-m", "benchmarks.fuzzing.material", str(material)], check=True)
        folders = [Path(scratch) / f"lane_{lane}" for lane in range(FLAGS.processes)]
        workspace = Workspace(material, folders, {name: READERS[name] for name in FLAGS.readers}, FLAGS.seed)
        if FLAGS.keep:
            _show(workspace, FLAGS.readers[0], FLAGS.first, folders[0])
            return
        start = time.perf_counter()
        counts = fuzz(
            workspace,
            FLAGS.inputs,
            first=FLAGS.first,
            processes=FLAGS.processes,
            seconds=FLAGS.seconds,
            memory_gb=FLAGS.memory_gb,
        )
        elapsed = time.perf_counter() - start
    _print(counts, elapsed)
    if FLAGS.record:
        from benchmarks.fuzzing.record import record  # starts JAX, so not before the forks

        limits = {"seconds": FLAGS.seconds, "memory_gb": FLAGS.memory_gb}
        by_kind = {name: dict(of_reader.outcomes) for name, of_reader in counts.items()}
        record(by_kind, seed=FLAGS.seed, seconds=elapsed, limits=limits)
    if any(of_reader.defects for of_reader in counts.values()):
        raise SystemExit(1)


def _show(workspace: Workspace, name: str, index: int, root: Path) -> None:
    """Tries one input in this process and shows all of its error."""
    path, content = workspace.input(name, index)
    Path(FLAGS.keep).write_bytes(content)
    print(f"input {index} of {name}, {path}, is in {FLAGS.keep}:", *workspace.trial(name, index, 0))
    (root / path).write_bytes(content)
    workspace.readers[name].read(root, root / path)


def _print(counts: dict[str, Counts], seconds: float) -> None:
    total = sum(sum(of_reader.outcomes.values()) for of_reader in counts.values())
    for name, of_reader in counts.items():
        print(f"{name:<28}", "  ".join(f"{kind} {n}" for kind, n in of_reader.outcomes.most_common()))
        seen = collections.Counter()
        for outcome in of_reader.examples:
            place = outcome.detail.split(" ")[0] if outcome.kind == "traceback" else outcome.detail[:40]
            seen[outcome.kind, place] += 1
            if seen[outcome.kind, place] == 1:
                print(f"    {outcome.kind}, input {outcome.index}: {outcome.detail}")
        for (kind, place), n in seen.items():
            if n > 1:
                print(f"    {n} x {kind}, {place}")
    print(f"{total} inputs in {seconds:.0f} s, {1000 * seconds / total:.1f} ms each")


if __name__ == "__main__":
    app.run(main)
