"""Commands over several runs, on a local cluster: the files and numbers that they leave in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvjax.commands.main import main
from kvjax.pipeline.train_apart import TrainingGroup
from tests.helpers.building import SMALL_MODEL, small_benchmark_config
from tests.helpers.clusters import local_cluster, run_without_dask
from tests.helpers.training import small_train_config

SCREEN = {
    "name": "tiny",
    "train_config": "train.json",
    "benchmark_config": "benchmark.json",
    "seeds": [3, 5],
    "output_dir": "unused",
    "factors": [
        {
            "name": "rate",
            "base_label": "rate-3e-3",
            "values": [{"label": "rate-1e-2", "train": {"optimization.learning_rate": 0.01}}],
        }
    ],
}


@pytest.fixture(scope="module")
def scheduler():
    """The file of a scheduler with one worker: what each further one has to compile takes the longest here."""
    with local_cluster() as cluster:
        yield cluster.file


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """The configs of a tiny screen, in the working directory."""
    model = SMALL_MODEL | {"n_layers": 1, "n_heads": 2}
    train = small_train_config("elsewhere", num_steps=16, model=model).model_dump(mode="json")
    documents = {"train": train, "benchmark": small_benchmark_config(), "screen": SCREEN}
    for name, document in documents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    monkeypatch.chdir(tmp_path)


def files(folder):
    """Lists the files of a study, but for locks and those whose names are drawn."""
    names = (path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())
    return {name for name in names if "/part_" not in name and not name.endswith("lock")}


def parameters(path):
    return {name: tensor.numpy().tobytes() for name, tensor in torch.load(path)["model_state"].items()}


def test_factor_screen_on_a_cluster(scheduler, configs, capsys):
    """A screen leaves the files, trained parameters, rows and findings that it leaves in one process of one device."""
    arguments = ["factor-screen", "--config=screen.json", "--noprogress"]
    run_without_dask(*arguments, "--output_dir=here")
    assert main([*arguments, "--output_dir=there", f"--scheduler={scheduler}"]) == 0
    assert files("here") == files("there")
    compared = [name for name in files("here") if name.endswith((".pt", "checkpoint_metrics.jsonl", "heads.jsonl"))]
    assert len(compared) == 4 * 5, "of each run two checkpoints and the best, and two tables"
    for name in compared:
        read = parameters if name.endswith(".pt") else Path.read_text
        assert read(Path("here") / name) == read(Path("there") / name), name
    one, other = (json.loads((Path(folder) / "factors/rate/factor.json").read_text()) for folder in ("here", "there"))
    assert one["findings"] == other["findings"] and one["summaries"] == other["summaries"]
    capsys.readouterr()
    assert main([*arguments, "--output_dir=there", f"--scheduler={scheduler}"]) == 0
    assert ": done" not in capsys.readouterr().out, "all of it is current"


@pytest.mark.parametrize(
    ("number", "sizes"), [(1, [5]), (2, [3, 2]), (3, [2, 2, 1]), (4, [2, 2, 1]), (5, [1] * 5), (9, [1] * 5)]
)
def test_parts_of_a_group(number, sizes):
    """A group is divided into at most so many parts, none empty, which together are the group in its order."""
    runs = dict.fromkeys(map(Path, "abcde"))
    parts = list(TrainingGroup(runs, Path("benchmark")).parts(number))
    assert [len(part.runs) for part in parts] == sizes
    assert [path for part in parts for path in part.runs] == list(runs)
