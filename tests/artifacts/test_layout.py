"""File names: each stands once, and is the one that docs/formats.md promises."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from kvjax.artifacts.layout import BenchmarkLayout, ComparisonLayout, ProbeSetLayout, RunLayout, arrays_beside, step_of

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted([*(ROOT / "kvjax").rglob("*.py"), *(ROOT / "converters").rglob("*.py")])

# Written out here a second time, so that a renamed file is noticed.
FILES = (
    *("run_config.json", "metrics.jsonl", "summary.json", "best_checkpoint.json", "best.pt", "last.pt"),
    *("probe_set.jsonl", "sweep.json", "checkpoint_metrics.jsonl", "checkpoint_metrics.nc"),
    *("heads.jsonl", "mlps.jsonl", "neurons.jsonl", "birth_windows.json", "story.json", "story.md"),
    *("comparison.json", "comparison.nc", "comparison.md"),
    "metadata.json",
    *(
        ".metadata.json",
        ".companion.json",
        ".fit.jsonl",
        ".sources.jsonl",
        ".pairs.jsonl",
        ".pairs.metadata.json",
        ".nc",
    ),
)
FOLDERS = (
    *("checkpoints", "analysis", "measured", "component_candidates", "interventions"),
    *("converted", "exported_torch", "evaluation"),
)


def test_names_of_a_run():
    """The files of a run have the names that docs/formats.md gives them."""
    run = RunLayout(Path("run"))
    assert run.config == Path("run/run_config.json")
    assert run.step_checkpoint(250) == Path("run/checkpoints/step_000250.pt")
    assert run.arrays == Path("run/analysis/checkpoint_metrics.nc")
    assert run.heads == Path("run/analysis/component_candidates/heads.jsonl")
    assert run.evaluation("best") == Path("run/analysis/evaluation/best.json")
    summary = run.intervention("neurons", "window_500")
    assert summary == Path("run/analysis/interventions/neurons/window_500.json")
    assert arrays_beside(summary) == Path("run/analysis/interventions/neurons/window_500.nc")
    probe = ProbeSetLayout(run.probe_set)
    assert probe.pairs_manifest == Path("run/analysis/probe_set.pairs.metadata.json")
    assert probe.fit == Path("run/analysis/probe_set.fit.jsonl")
    assert BenchmarkLayout(Path("b")).split("train") == Path("b/train.jsonl")
    comparison = ComparisonLayout(Path("c"))
    assert (comparison.comparison, comparison.arrays) == (Path("c/comparison.json"), Path("c/comparison.nc"))


@pytest.mark.parametrize(
    ("name", "step"),
    [("step_000250.pt", 250), ("step_7.pt", 7), ("best.pt", None), ("step_.pt", None), ("step_000250.pt.part", None)],
)
def test_step_of_a_file_name(name, step):
    """A step is read whatever its number of digits, and from whole names alone."""
    assert step_of(Path(name)) == step


def texts(path: Path):
    """Yields (line, text, whether it is joined to a path) of every literal of a module that is no docstring."""
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            for part in ast.walk(node.right):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, part.value, True
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            yield node.lineno, node.value, False


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.name != "layout.py"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_one_home_of_every_file_name(path):
    """No module but the layout builds a path from a file's or folder's name; sentences may mention one."""
    for line, text, joined in texts(path):
        sentence = " " in text.strip()
        assert sentence or text not in FILES, f"{path}:{line}: {text} belongs in artifacts/layout.py"
        assert not (joined and text in FOLDERS), f"{path}:{line}: {text} belongs in artifacts/layout.py"
        assert not re.fullmatch(r"step_|step_.*\.pt", text), f"{path}:{line}: {text} belongs in artifacts/layout.py"
