"""The stages of a study: not current before they ran, current after, and not once an input has changed."""

import json
import shutil

import pytest
import torch

from kvjax.artifacts.run_dir import RunDir
from kvjax.config.benchmark import BenchmarkConfig
from kvjax.config.train import TrainConfig
from kvjax.intervene.settings import InterventionSettings
from kvjax.pipeline.interventions import intervene, interventions_are_current
from kvjax.pipeline.progress import no_progress
from kvjax.pipeline.settings import PairSource, RunsOnBenchmark
from kvjax.pipeline.stages import (
    CONVERT,
    EVALUATE,
    GENERATE,
    INTERVENE,
    PROBE_SET,
    SELECT,
    STAGES,
    SWEEP,
    TRAIN,
    WINDOWS,
    Study,
)
from tests.helpers.building import SMALL_MODEL, small_benchmark_config


def train_config(folder, **changes):
    document = {
        "run_name": "tiny",
        "seed": 3,
        "benchmark_dir": str(folder / "benchmark"),
        "output_dir": str(folder / "run"),
        "batch_size": 8,
        "num_steps": 16,
        "log_every_steps": 8,
        "eval_every_steps": 8,
        "checkpoint_every_steps": 8,
        "model": SMALL_MODEL | {"n_layers": 1, "n_heads": 2},
        "optimization": {"learning_rate": 3e-3, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.95},
        "evaluation": {
            "batch_size": 8,
            "tracked_splits": ["validation_iid", "heldout_pairs"],
            "birth_thresholds": {"answer_accuracy": 0.9, "q": 0.2, "r": 0.2, "w": 1.0},
        },
        "checkpointing": {"best_checkpoint_split": "validation_iid"},
    }
    return TrainConfig.model_validate(document | changes)


def study_in(folder, *, benchmark=None, **changes):
    """Plans a study of one run in a folder."""
    config = BenchmarkConfig.model_validate(small_benchmark_config(**(benchmark or {})))
    runs = {folder / "run": train_config(folder, **changes)}
    places = {name: folder / name for name in ("comparison", "report")}
    return Study(folder / "benchmark", config, runs, folder / "ranking.json", **places)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study after every stage but interventions, each of which was not current before it ran and is after."""
    folder = tmp_path_factory.mktemp("study")
    study = study_in(folder)
    for stage in (GENERATE, TRAIN, CONVERT, EVALUATE, SELECT, PROBE_SET, SWEEP, WINDOWS):
        before = stage.current(study)
        assert not before.holds and before.reason, stage.name
        stage.run(study, no_progress)
        after = stage.current(study)
        assert after.holds, f"{stage.name}: {after.reason}"
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy to change."""
    return shutil.copytree(finished, tmp_path / "study")


def states(study):
    return {stage.name for stage in STAGES if stage.current(study).holds}


def test_needs_of_stages():
    """Each stage needs only stages before it, and is run by a command of its own."""
    seen = set()
    for stage in STAGES:
        assert set(stage.needs) <= seen, stage.name
        seen.add(stage.name)
    assert len({stage.command for stage in STAGES}) == len(STAGES) == 11


def test_study_that_was_moved(folder):
    """A finished study is current wherever it lies, as far as it names no places."""
    assert states(study_in(folder)) >= {"generate", "train", "convert", "probe set", "sweep", "windows"}


def test_benchmark_of_another_config(folder):
    """A changed benchmark config leaves the drawn benchmark behind; another draw is refused."""
    study = study_in(folder, benchmark={"num_values": 49})
    assert not GENERATE.current(study).holds
    with pytest.raises(ValueError, match="found the benchmark small of another config"):
        GENERATE.run(study, no_progress)


def test_run_of_another_config(folder):
    """A changed training config leaves the trained run behind, and the reason gives both values."""
    state = TRAIN.current(study_in(folder, batch_size=16))
    assert not state.holds and "batch_size 8 there, 16 here" in state.reason


def test_longer_run(folder):
    """A run without its summary goes on."""
    (folder / "run" / "summary.json").unlink()
    state = TRAIN.current(study_in(folder))
    assert not state.holds and "has reached 16 of 16 steps" in state.reason


def test_replaced_checkpoint(folder):
    """A checkpoint of other bytes is converted again, and the best one evaluated and ranked again."""
    for name in ("step_000008.pt", "best.pt"):
        path = folder / "run" / "checkpoints" / name
        document = torch.load(path, weights_only=True)
        torch.save(document | {"metrics": {}}, path)
    study = study_in(folder)
    converted = CONVERT.current(study)
    assert not converted.holds and converted.reason.startswith("1 of 2 checkpoints are not in")
    assert converted.command == f"kvjax convert --run_dirs={folder / 'run'}"
    assert not EVALUATE.current(study).holds and not SELECT.current(study).holds


def test_another_best_checkpoint(folder):
    """A ranking is of the best checkpoints that there were."""
    path = folder / "run" / "best_checkpoint.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"step": record["step"] + 1}))
    assert not SELECT.current(study_in(folder)).holds


def test_probe_set_of_another_benchmark(folder):
    """A probe set is of the benchmark that it was chosen from."""
    study = study_in(folder)
    metadata = folder / "benchmark" / "metadata.json"
    config = json.loads((folder / "run" / "run_config.json").read_text())
    (folder / "run" / "run_config.json").write_text(json.dumps(config | {"benchmark_dir": str(folder / "benchmark")}))
    assert PROBE_SET.current(study).holds
    metadata.write_text(metadata.read_text() + " ")
    state = PROBE_SET.current(study)
    assert not state.holds and "another benchmark" in state.reason and not SWEEP.current(study).holds


def test_new_checkpoint(folder):
    """A checkpoint more is measured by the sweep, and then windows are looked for again."""
    study, checkpoints = study_in(folder), folder / "run" / "checkpoints"
    document = torch.load(checkpoints / "step_000016.pt", weights_only=True)
    torch.save(document | {"step": 12}, checkpoints / "step_000012.pt")
    state = SWEEP.current(study)
    assert not state.holds and "1 of 3 checkpoints are not measured (steps 12)" in state.reason
    assert WINDOWS.current(study).holds
    SWEEP.run(study, no_progress)
    assert SWEEP.current(study).holds and not WINDOWS.current(study).holds
    WINDOWS.run(study, no_progress)
    assert WINDOWS.current(study).holds


def test_interventions(folder):
    """Interventions are current once every kind asked for is measured on the checkpoints that there are."""
    study, run = study_in(folder), RunDir.open(folder / "run")
    state = INTERVENE.current(study)
    assert state.holds and state.reason == "no run has a birth window to intervene in"
    state = interventions_are_current(run, InterventionSettings())
    assert not state.holds and "ready for circuit work" in state.reason
    settings = InterventionSettings(kinds=("necessity",), steps="16", pairs_per_kind=2, force=True)
    before = interventions_are_current(run, settings)
    assert not before.holds and before.reason == "1 of 1 studies are not measured (necessity)"
    intervene(RunsOnBenchmark.of([run.path]), PairSource(), settings)
    assert interventions_are_current(run, settings).holds
    path = run.checkpoints[16]
    torch.save(torch.load(path, weights_only=True) | {"metrics": {}}, path)
    assert not interventions_are_current(run, settings).holds
