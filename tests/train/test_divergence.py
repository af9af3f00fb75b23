"""Seeds that diverge: what is recorded, and that the others go on."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import InputError
from kvjax.pipeline.settings import TrainSettings
from kvjax.pipeline.train import train
from kvjax.task.benchmark import Benchmark
from kvjax.train.loop import Training
from tests.helpers.building import read_lines
from tests.helpers.training import small_train_config


@pytest.mark.filterwarnings("ignore::kvjax.errors.Note")
def test_divergence_of_all_seeds(tmp_path, small_benchmark):
    """A training all of whose seeds diverge is refused with the steps, which its runs record."""
    optimization = small_train_config(small_benchmark).optimization.model_copy(
        update={"learning_rate": 1e30, "warmup_steps": 0}
    )
    config = small_train_config(small_benchmark, optimization=optimization.model_dump())
    (tmp_path / "config.json").write_text(config.model_dump_json())
    settings = TrainSettings(config=str(tmp_path / "config.json"), seeds=(3, 4), output_dir=str(tmp_path / "runs"))
    with pytest.raises(InputError, match=r"expected a finite loss and gradient; .*seed 4 diverged at step 2"):
        train(settings)
    for seed in (3, 4):
        run = tmp_path / "runs" / f"seed_{seed}"
        opened = RunDir.open(run)
        assert opened.diverged_at == 2 and opened.complete and not opened.checkpoints
        assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == [1], "no row holds a number that is none"


class Kept:
    """Keeps what a seed's training hands out."""

    def __init__(self):
        self.rows, self.saved, self.diverged = [], {}, None

    def log(self, row):
        self.rows.append(row)

    def save(self, step, params, mu, nu, evaluations):
        self.saved[step] = jax.tree.leaves((params, mu, nu))

    def diverge(self, step, loss):
        self.diverged = step


def test_divergence_of_one_seed(small_benchmark):
    """A seed that diverges ends alone: the other has the bits that it has beside a healthy one."""
    training = Training(small_train_config(small_benchmark, num_steps=8), Benchmark.open(small_benchmark), (3, 4))
    healthy, lost = training.initial_states()
    broken = dataclasses.replace(lost, params=jax.tree.map(lambda leaf: leaf * 1e30, lost.params))
    kept = {}
    for name, second in (("healthy", lost), ("broken", broken)):
        kept[name] = (Kept(), Kept())
        training.run([healthy, second], kept[name], advance=lambda steps: None)
    assert kept["healthy"][1].diverged is None and list(kept["healthy"][1].saved) == [8]
    assert kept["broken"][1].diverged == 1 and not kept["broken"][1].saved and not kept["broken"][1].rows
    assert kept["broken"][0].rows == kept["healthy"][0].rows
    for ours, theirs in zip(kept["broken"][0].saved[8], kept["healthy"][0].saved[8], strict=True):
        np.testing.assert_array_equal(ours, theirs)
