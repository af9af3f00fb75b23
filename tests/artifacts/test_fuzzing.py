"""The harness of `benchmarks/fuzz.py` itself: it notices what it looks for, and ends whatever happens."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from benchmarks.fuzz import Workspace
from benchmarks.fuzzing.mutations import damage_bytes, damage_json, damage_json_lines
from benchmarks.fuzzing.reader import Reader, damaged
from kvjax.errors import InputError, unusable
from kvjax.task.benchmark import Benchmark
from kvjax.task.pairs import generate_pairs
from kvjax.task.probe_set import own_probe_set
from tests.helpers.fuzzing import check_fuzzed


def refuse(root, file):
    if file.read_bytes() != b'{"a": 1}':
        raise unusable(file, "the sound file", "another")


def refuse_without_a_name(root, file):
    if file.read_bytes() != b'{"a": 1}':
        raise InputError("expected something else")


def refuse_after_writing(root, file):
    if file.read_bytes() != b'{"a": 1}':
        (root / "other.json").write_text("written")
        raise unusable(file, "the sound file", "another")


def divide(root, file):
    return 1 / (file.read_bytes() == b'{"a": 1}')


def read(root, file):
    return file.read_bytes()


def accept(value, sound, file):
    return None


KINDS = {
    "refused": Reader("", ["a.json"], [damage_json], refuse, ""),
    "bad refusal": Reader("", ["a.json"], [damage_json], refuse_without_a_name, ""),
    "bad refusal, written": Reader("", ["a.json"], [damage_json], refuse_after_writing, ""),
    "traceback": Reader("", ["a.json"], [damage_json], divide, ""),
    "accepted damage": Reader("", ["a.json"], [damage_json], read, ""),
    "changed": Reader("", ["a.json"], [damage_json], read, "", accept),
    "equal": Reader("", ["a.json"], [damage_json], lambda root, file: 1, ""),
}


@pytest.mark.parametrize("kind", KINDS)
def test_outcomes_of_fuzzed_inputs(tmp_path, kind):
    """Refusals, good and bad, tracebacks, accepted damage, changes and equal values are counted apart."""
    (material := tmp_path / "material").mkdir()
    (material / "a.json").write_text('{"a": 1}')
    (material / "other.json").write_text("as it was")
    workspace = Workspace(material, [tmp_path / "lane"], KINDS, seed=1)
    for index in range(5):
        found, detail = workspace.trial(kind, index, 0)
        assert (found == kind.split(",")[0]) or workspace.input(kind, index)[1] == b'{"a": 1}', detail


@pytest.mark.parametrize("damage", [damage_bytes, damage_json_lines])
def test_repeatable_damage(damage):
    """The number of an input makes the same bytes again, and other numbers make others."""
    reader = Reader("", ["rows.jsonl"], [damage], read, "")
    sound = {"rows.jsonl": b"".join(json.dumps({"step": step, "loss": 0.5}).encode() + b"\n" for step in range(20))}
    made = [damaged(reader, "rows", index, 1, sound)[1] for index in range(40)]
    assert made == [damaged(reader, "rows", index, 1, sound)[1] for index in range(40)]
    assert len(set(made)) > 30


def test_guard_of_processes_that_hang_or_die():
    """An input that hangs, aborts or fills the memory is counted, and the others are still tried."""
    script = """
        import os, time
        from benchmarks.fuzzing.guard import try_inputs

        def trial(reader, index, lane):
            if index == 1:
                time.sleep(60)
            elif index == 3:
                os.abort()
            elif index == 4:
                bytearray(b"x") * (40 << 20)
            return "refused", ""

        found = try_inputs(trial, {"toy": 7}, lanes=2, seconds=0.6, memory_bytes=20 << 20)
        print(sorted((outcome.index, outcome.kind) for outcome in found))
    """
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=root, capture_output=True, text=True, timeout=60
    )
    kinds = ["refused", "hang", "refused", "killed", "memory", "refused", "refused"]
    assert ended.stdout.strip() == str(list(enumerate(kinds))), ended.stderr


def test_fuzzed_inputs_of_a_run(tmp_path, small_run, small_benchmark):
    """Damaged files of a benchmark and of a run that nothing was measured on are refused, or read as valid."""
    benchmark = Benchmark.open(small_benchmark)
    generate_pairs(own_probe_set(small_run / "analysis/probe_set.jsonl", benchmark), benchmark, pairs_per_kind=2)
    names = ["run_config.json", "benchmark metadata", "probe set", "probe set's manifest", "pairs", "pairs' manifest"]
    names += ["metrics.jsonl", "best_checkpoint.json"]
    check_fuzzed(tmp_path, small_run, small_benchmark, step=300, names=names, inputs=6)
