"""A small study that the tests of this folder share."""

from __future__ import annotations

import json

import pytest

from kvjax.pipeline.pipeline import run_pipeline
from tests.helpers.building import SMALL_MODEL, small_benchmark_config
from tests.helpers.studies import study_settings
from tests.helpers.training import small_train_config


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """Benchmark, one short run and all its results, made by the pipeline from two configs."""
    folder = tmp_path_factory.mktemp("study")
    config = small_train_config("elsewhere", num_steps=16, model=SMALL_MODEL | {"n_layers": 1, "n_heads": 2})
    train = config.model_dump(mode="json")
    (folder / "train.json").write_text(json.dumps(train))
    (folder / "benchmark.json").write_text(json.dumps(small_benchmark_config()))
    reports = run_pipeline(study_settings(folder))
    assert [report.stage.name for report in reports if report.skipped] == ["intervene"], "nothing formed in 16 steps"
    return folder
