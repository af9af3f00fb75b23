"""Every command in README and tutorial runs as it stands there, on data small enough for a test."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvjax.commands.main import COMMANDS, main
from tests.helpers.building import SMALL_MODEL, small_benchmark_config, write_run, write_small_benchmark
from tests.helpers.training import small_train_config

ROOT = Path(__file__).resolve().parents[1]
STEPS = (1750, 2000, 4000, 6000)  # those of the README's run that its commands name

# What stands for something in a document -> what it is in the test's folder.
PLACES = {
    "--run_dirs=…": "--run_dirs=runs/seed_7",
    "--benchmark_dir=…": "--benchmark_dir=data/benchmark",
    "--probe_set=…": "--probe_set=probe_set.jsonl",
}
# Flags that make a documented command small. Nothing forms in runs this small, so that interventions are forced.
SMALLER = {
    "quickstart": ["--benchmark_config=small_benchmark.json", "--train_config=small_train.json", "--seeds=3"],
    "pipeline": ["--benchmark_config=small_benchmark.json", "--config=small_train.json", "--seeds=3"],
    "generate-benchmark": ["--config=small_benchmark.json"],
    "train": ["--config=small_train.json", "--benchmark_dir=data/benchmark", "--output_dir=trained"],
    "generate-probe-set": ["--examples_per_split=8", "--fit_examples=20"],
    "intervene": ["--force", "--steps=4000,6000", "--pairs_per_kind=2", "--kinds=activation_patching"],
}


def documented(name: str) -> list[str]:
    """Collects the commands of a document in their order: lines of code blocks, and code with flags in its text."""
    text = (ROOT / name).read_text(encoding="utf-8")
    in_blocks = r"^(kvjax [a-z-]+ --.*|python docs/.*)$"
    in_text = r"^\| `(kvjax [^`<]+)`|`(kvjax [a-z-]+ --[^`<]+)`"
    found = re.findall(f"{in_blocks}|{in_text}", text, flags=re.M)
    return list(dict.fromkeys(next(one for one in groups if one) for groups in found))


def run_command(line: str) -> None:
    """Runs a documented command in the present folder, made small."""
    program, name, *flags = shlex.split(line)
    flags = [PLACES.get(flag, flag) for flag in flags]
    assert not any("…" in flag for flag in flags), line
    if program == "python":
        subprocess.run([sys.executable, str(ROOT / name), *flags, "--steps=24", "--save_every=8"], check=True)
        return
    smaller = SMALLER.get(name, [])
    replaced = {flag.partition("=")[0] for flag in smaller} | ({"--window"} if name == "intervene" else set())
    given = [flag for flag in flags if flag.partition("=")[0] not in replaced]
    if name == "intervene" and "runs/mine" in line:
        smaller = ["--steps=16,24" if flag.startswith("--steps") else flag for flag in smaller]
    assert main([name, *given, *smaller]) == 0, line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as the README has it: a benchmark, two runs and small configs."""
    folder = tmp_path_factory.mktemp("reader")
    write_small_benchmark(folder / "data" / "benchmark")
    (folder / "small_benchmark.json").write_text(json.dumps(small_benchmark_config()))
    small = small_train_config("replaced", num_steps=16, model=SMALL_MODEL | {"n_layers": 1, "n_heads": 2})
    (folder / "small_train.json").write_text(json.dumps(small.model_dump(mode="json")))
    for seed in (7, 11):
        name = f"seed_{seed}"
        settings = {"run_name": name, "seed": seed, "num_steps": STEPS[-1]}
        write_run(folder / "runs" / name, folder / "data" / "benchmark", steps=STEPS, **settings)
    return folder


def test_readme(folder, monkeypatch, tmp_path):
    """The README names every command, and each runs, those of its text first and those of its table in turn."""
    monkeypatch.chdir(shutil.copytree(folder, tmp_path / "here"))
    lines = documented("README.md")
    assert {shlex.split(line)[1] for line in lines} == set(COMMANDS)
    in_text = [line for line in lines if "runs/seed_7" in line]
    assert len(in_text) >= 3
    shared = next(line for line in lines if "generate-probe-set" in line)
    for line in [shared, *in_text]:
        run_command(line)
    # One probe set for all runs, from here on: the row of the table that measures them anew.
    shutil.rmtree(tmp_path / "here" / "runs" / "seed_7" / "analysis")
    for line in lines:
        if line not in (shared, *in_text):
            run_command(line)


def test_tutorial(folder, monkeypatch, tmp_path):
    """The tutorial's commands, one after the other, go from an empty folder to a report; its pictures are there."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("small_benchmark.json", "small_train.json"):
        shutil.copy(folder / name, here)
    monkeypatch.chdir(here)
    for line in documented("docs/tutorial.md"):
        run_command(line)
    assert (here / "runs" / "mine" / "analysis" / "report.html").is_file()
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert len(pictures) >= 4 and all((ROOT / "docs" / name).is_file() for name in pictures)
    drawn = {path.name for path in (here / "figures").iterdir()}
    shown = {Path(name).name.removeprefix("tutorial_") for name in pictures}
    assert {name for name in shown if "interventions" not in name and "windows" not in name} <= drawn
