"""`Next:` lines: what they print can be pasted into a shell, or into Python."""

from __future__ import annotations

import ast
import json
import shlex
import types
from pathlib import Path

import pytest

from kvjax.artifacts.find_runs import names_of_results
from kvjax.artifacts.layout import RunLayout
from kvjax.commands.main import main
from kvjax.errors import command
from kvjax.pipeline import text
from kvjax.pipeline.quickstart import run_globs
from kvjax.pipeline.settings import QuickstartSettings
from tests.helpers.building import run_config

ODD = ["plain", "a b", "it's", 'say "x"', "$HOME;ls", "g[1]x", "-dash", "ü/日本"]


def next_line(capsys):
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: ")]
    return line.removeprefix("Next: ")


@pytest.mark.parametrize("name", ODD)
def test_commands_to_paste(capsys, name):
    """A shell reads each command as the words that it stands for, whatever a path holds."""
    path = Path(name)
    printers = {
        "benchmark": lambda: text.print_benchmark(types.SimpleNamespace(splits={}, path=path)),
        "trained": lambda: text.print_trained([types.SimpleNamespace(seed=1, evaluations={}, path=path)]),
        "next": lambda: text.print_next("convert", run_dirs=(name,), benchmark_dir=name, steps=None, overwrite=True),
    }
    expected = {
        "benchmark": ["generate-probe-set", f"--benchmark_dir={name}", "--output=probe_set.jsonl"],
        "trained": ["checkpoint-sweep", f"--run_dirs={name}"],
        "next": ["convert", f"--run_dirs={name}", f"--benchmark_dir={name}", "--overwrite"],
    }
    for of, show in printers.items():
        show()
        assert shlex.split(next_line(capsys)) == ["kvjax", *expected[of]]


@pytest.mark.parametrize("name", ODD)
def test_flag_to_paste(capsys, name):
    """A probe set is of no run yet: the flag that sweeps take it by is one word to a shell."""
    manifest = types.SimpleNamespace(split_counts={}, fit_split="train", num_fit_records=1)
    text.print_probe_set(types.SimpleNamespace(path=Path(name), manifest=manifest))
    assert shlex.split(capsys.readouterr().out.splitlines()[-1].partition(": ")[2]) == [f"--probe_set={name}"]


@pytest.mark.parametrize("name", [*ODD, "back\\slash"])
def test_python_to_paste(capsys, name):
    """The line of Python after a sweep opens the file, whatever its path holds."""
    text.print_sweep_example(types.SimpleNamespace(layout=RunLayout(Path(name))))
    call = ast.parse(next_line(capsys).partition(" (README")[0], mode="eval").body
    assert ast.literal_eval(call.args[0]) == f"{name}/analysis/checkpoint_metrics.nc"


def test_lists_in_commands():
    """Lists are joined by commas; if a member has one, the flag is repeated for each."""
    assert command("status", run_dirs=["a", "b c"]) == "kvjax status --run_dirs='a,b c'"
    assert command("status", run_dirs=[Path("a,b"), Path("c")]) == "kvjax status --run_dirs=a,b --run_dirs=c"
    assert command("status", require=False, steps=None, reasons=True) == "kvjax status --reasons"


def test_names_of_results(tmp_path, monkeypatch):
    """After `--output_dir`, the folder is named, or a glob that finds the folders of several runs in it."""
    monkeypatch.chdir(tmp_path)
    assert names_of_results(("a", "b*"), None) == ("a", "b*")
    Path("one").mkdir()
    Path("one/source_run.json").write_text("{}")
    assert names_of_results(("a",), "one") == ("one",)
    assert names_of_results(("a", "b"), "many[1]/") == ("many[[]1]/*",)
    assert run_globs(QuickstartSettings(output_dir="q[1]")) == ["q[[]1]/runs/*"]


def test_next_command_after_windows(swept_run_at, capsys):
    """`birth-windows` prints the run as it was named, quoted."""
    run = swept_run_at("it's a,run")
    assert main(["birth-windows", f"--run_dirs={run}"]) == 0
    assert shlex.split(next_line(capsys)) == ["kvjax", "status", f"--run_dirs={run}"]


@pytest.fixture
def swept_run_at(tmp_path, monkeypatch):
    """Makes a run directory of a name; nothing looks into its sweep."""
    monkeypatch.setattr("kvjax.pipeline.windows.find_birth_windows", lambda *args, **how: [])

    def make(name):
        run = tmp_path / name
        run.mkdir()
        (run / "run_config.json").write_text(json.dumps(run_config(tmp_path)))
        return run

    return make
