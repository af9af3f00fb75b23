"""The whole study in one command: stages run once, are skipped when current, and end in a comparison."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import xarray as xr

import kvjax
from kvjax.artifacts.comparison_schema import read_comparison
from kvjax.artifacts.run_dir import RunDir
from kvjax.commands.main import main
from kvjax.errors import InputError
from kvjax.pipeline.pipeline import print_summary, run_pipeline
from kvjax.pipeline.settings import PipelineSettings
from tests.helpers.studies import study_settings


def test_study_that_is_current(study, capsys):
    """A second call runs nothing, and says so of each stage."""
    reports = run_pipeline(study_settings(study))
    assert [report.stage.name for report in reports] == [
        *("generate", "train", "probe set", "sweep", "windows", "evaluate", "intervene", "report")
    ]
    assert all(report.skipped for report in reports)
    assert capsys.readouterr().out.count("current, skipped") == 8


@pytest.fixture
def diverged_early(study, tmp_path):
    """The settings of a study of two seeds, the second of which diverged before its first checkpoint."""
    folder = shutil.copytree(study, tmp_path / "parent")
    settings = dataclasses.replace(study_settings(folder), seeds=(3, 5))
    trained, lost = (folder / "study" / "runs" / f"seed_{seed}" for seed in (3, 5))
    config = json.loads((trained / "run_config.json").read_text())
    (lost / "checkpoints").mkdir(parents=True)
    config |= {"seed": 5, "run_name": config["run_name"].replace("seed_3", "seed_5")}
    (lost / "run_config.json").write_text(json.dumps(config))
    (lost / "summary.json").write_text(json.dumps({"diverged_at_step": 2}))
    return settings


def test_run_that_diverged_early(diverged_early, capsys):
    """A run without a checkpoint stops nothing; it is in no result, and the summary says so."""
    reports = run_pipeline(diverged_early)
    assert [report.stage.name for report in reports if not report.skipped] == []
    print_summary(diverged_early, reports)
    printed = capsys.readouterr().out
    lost = f"{diverged_early.output_dir}/runs/seed_5"
    assert f"{lost}: in no result; it diverged at step 2, before its first step checkpoint" in printed
    assert f"{lost}: story" not in printed and not (Path(lost) / "analysis").exists()


def test_runs_that_all_diverged_early(diverged_early):
    """With no checkpoint at all there is nothing to go on with: one line."""
    only_lost = dataclasses.replace(diverged_early, seeds=(5,))
    with pytest.raises(InputError, match=r"expected a step checkpoint of at least one run .*; found none"):
        run_pipeline(only_lost)


def test_run_that_diverged_late(two_runs, capsys):
    """A run that diverged lacks the later steps: runs are compared at the steps that all have, and the page is made."""
    lost = two_runs / "runs" / "seed_5"
    *_, last = sorted(lost.glob("checkpoints/step_*.pt"))
    last.unlink()
    shutil.rmtree(lost / "analysis")
    (lost / "summary.json").write_text(json.dumps({"diverged_at_step": RunDir.open(lost).config.num_steps - 1}))
    assert main(["pipeline", f"--run_dirs={two_runs}/runs/*", f"--output_dir={two_runs}", "--noprogress"]) == 0
    assert "compare: done" in capsys.readouterr().out and (two_runs / "report.html").is_file()
    with xr.open_dataset(two_runs / "comparison" / "comparison.nc") as compared:
        assert max(compared.step) == max(RunDir.open(lost).checkpoints)


@pytest.fixture
def two_runs(study, tmp_path):
    """Two runs of one benchmark; the second is a copy that records another seed."""
    folder = shutil.copytree(study / "study", tmp_path / "study")
    for seed in (3, 5):
        run = folder / "runs" / f"seed_{seed}"
        if seed == 5:
            shutil.copytree(folder / "runs" / "seed_3", run)
        document = json.loads((run / "run_config.json").read_text())
        document |= {"seed": seed, "run_name": f"tiny_seed_{seed}", "benchmark_dir": str(folder / "benchmark")}
        (run / "run_config.json").write_text(json.dumps(document))
    return folder


def test_pipeline_of_existing_runs(two_runs, capsys):
    """Runs that exist are not trained; their comparison is made, and is current from then on."""
    arguments = ["pipeline", f"--run_dirs={two_runs}/runs/*", f"--output_dir={two_runs}", "--noprogress"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "compare: done" in printed and "2 of 7 stages run" in printed and "\\n" not in printed
    found = read_comparison(two_runs / "comparison" / "comparison.json")
    assert "\n".join(["Comparison of 2 runs:", *(f"- {sentence}" for sentence in found.findings)]) in printed
    assert [run.seed for run in found.runs] == [3, 5] and len(found.matching) == 1
    with xr.open_dataset(two_runs / "comparison" / "comparison.nc", group="order") as order:
        assert "order_share" in order
    assert (two_runs / "comparison" / "figures" / "seeds_validation_iid.png").stat().st_size > 1000
    assert main(arguments) == 0
    assert "0 of 7 stages run" in capsys.readouterr().out


def test_patching_where_roles_are_compared(two_runs, monkeypatch, capsys):
    """Runs that no window had patched where roles are compared are patched there, and once."""
    last = max(RunDir.open(two_runs / "runs" / "seed_5").checkpoints)
    monkeypatch.setattr("kvjax.pipeline.stages.unpatched", lambda runs: {"tiny_seed_5": [last]})
    flags = [f"--run_dirs={two_runs}/runs/*", f"--output_dir={two_runs}", "--pairs_per_kind=2", "--noprogress"]
    assert main(["pipeline", *flags]) == 0
    assert "intervene: done" in capsys.readouterr().out
    made = sorted(two_runs.glob("runs/*/analysis/interventions/*/*.nc"))
    assert [path.relative_to(two_runs / "runs").parts[0] for path in made] == ["seed_5"]
    assert made[0].parent.name == "activation_patching"
    assert main(["pipeline", *flags]) == 0
    assert "intervene: current, skipped" in capsys.readouterr().out


def test_comparison_from_python(two_runs):
    """The function returns labelled arrays and sentences; two copies of a run agree in everything."""
    tree = kvjax.compare_seeds(f"{two_runs}/runs/*", null_draws=20)
    accuracy = tree["answer_accuracy"]
    assert accuracy.sizes["run"] == 2 and bool((accuracy.isel(run=0) == accuracy.isel(run=1)).all())
    assert any("answer accuracy at each run's best" in sentence for sentence in tree.attrs["findings"])
    assert not (two_runs / "comparison").exists()


def test_edited_comparison(two_runs, capsys):
    """A comparison that was edited is made again."""
    arguments = ["pipeline", f"--run_dirs={two_runs}/runs/*", f"--output_dir={two_runs}", "--noprogress"]
    assert main(arguments) == 0
    path = two_runs / "comparison" / "comparison.json"
    path.write_text(path.read_text().replace('"findings": [', '"findings": ["made up", '))
    capsys.readouterr()
    assert main(arguments) == 0
    assert "edited file" in capsys.readouterr().out
    assert "made up" not in path.read_text()


def test_config_without_a_benchmark():
    """A training config whose name no benchmark config has needs one to draw."""
    with pytest.raises(InputError, match="benchmark_config: expected a benchmark config"):
        run_pipeline(PipelineSettings(config="symbolic_kv_formation"))


def test_single_run_to_compare(two_runs, capsys):
    """One run is no comparison: one line, status 2."""
    assert main(["compare-seeds", f"--run_dirs={two_runs}/runs/seed_3", f"--output_dir={two_runs}/one"]) == 2
    assert "two or more runs to compare" in capsys.readouterr().err
