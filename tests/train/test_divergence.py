"""Seeds that diverge: what is recorded, and that the others go on."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import InputError
from kvjax.pipeline.settings import TrainSettings
from kvjax.pipeline.train import run_directories, runs_are_trained, train_missing_runs, train_runs
from kvjax.pipeline.train_seeds import train
from kvjax.task.benchmark import Benchmark
from kvjax.train.loop import Training
from tests.helpers.building import read_lines
from tests.helpers.training import Kept, small_train_config


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


def test_divergence_of_one_seed(small_benchmark):
    """A seed that diverges ends alone: the other has the bits that it has beside a healthy one."""
    configs = [small_train_config(small_benchmark, num_steps=8, seed=seed) for seed in (3, 4)]
    training = Training(configs, Benchmark.open(small_benchmark))
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


def test_divergence_that_an_evaluation_finds(small_benchmark, monkeypatch):
    """A step's loss is that of the parameters before it: if an evaluation after it is no number, the run ends there."""
    configs = [small_train_config(small_benchmark, num_steps=8, eval_every_steps=4, seed=seed) for seed in (3, 4)]
    training = Training(configs, Benchmark.open(small_benchmark))
    evaluate, calls = training._evaluator.evaluate, []

    def lost_in_the_second(params, split, **limits):
        calls.append(split)
        found = evaluate(params, split, **limits)
        splits = len(configs[0].evaluation.tracked_splits)
        return found if len(calls) != 2 * splits else dataclasses.replace(found, loss=float("nan"))

    monkeypatch.setattr(training._evaluator, "evaluate", lost_in_the_second)
    kept = Kept(), Kept()
    training.run(training.initial_states(), kept, advance=lambda steps: None)
    assert kept[0].diverged is None and max(kept[0].saved) == 8
    assert kept[1].diverged == 4 and not any(row["phase"] == "eval" for row in kept[1].rows)


@pytest.mark.filterwarnings("ignore::kvjax.errors.Note")
def test_divergence_before_an_interruption(tmp_path, small_benchmark):
    """A diverged run is finished at once: what is trained after an interruption are the others."""
    wild = small_train_config(small_benchmark).optimization.model_dump() | {"learning_rate": 1e30, "warmup_steps": 0}
    configs = {"wild": {"optimization": wild}, "calm": {}}
    runs = {tmp_path / name: small_train_config(small_benchmark, **changes) for name, changes in configs.items()}
    benchmark = Benchmark.open(small_benchmark)

    def stop_at_once(steps):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_runs(runs, benchmark, resume=False, overwrite=False, advance=stop_at_once)
    assert not (tmp_path / "calm" / "summary.json").exists()
    before = (tmp_path / "wild" / "summary.json").stat()
    train_missing_runs(runs, benchmark, advance=lambda steps: None)
    assert RunDir.open(tmp_path / "calm").complete and RunDir.open(tmp_path / "wild").diverged_at == 2
    after = (tmp_path / "wild" / "summary.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.filterwarnings("ignore::kvjax.errors.Note")
def test_resume_beside_a_diverged_seed(tmp_path, small_benchmark):
    """A resume leaves a diverged seed as it ended, and goes on from the last step of the others, not from its last."""
    config = small_train_config(small_benchmark, num_steps=6, checkpoint_every_steps=2, eval_every_steps=2)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    given = TrainSettings(config=str(tmp_path / "config.json"), seeds=(3, 4), output_dir=str(tmp_path / "runs"))
    train(given)
    lost, calm = (RunDir.open(tmp_path / "runs" / f"seed_{seed}") for seed in (4, 3))
    for step in (4, 6):
        lost.checkpoints[step].unlink()
    document = json.loads(lost.layout.summary.read_text()) | {"diverged_at_step": 3}
    lost.layout.summary.write_text(json.dumps(document))
    longer = config.model_copy(update={"num_steps": 8})
    (tmp_path / "config.json").write_text(longer.model_dump_json())
    ended = {run.seed: run.diverged_at for run in train(dataclasses.replace(given, resume=True))}
    assert ended == {3: None, 4: 3}
    resumed = [row["step"] for row in read_lines(calm.layout.metrics) if row["phase"] == "resume"]
    assert resumed == [6] and max(RunDir.open(calm.path).checkpoints) == 8
    assert max(RunDir.open(lost.path).checkpoints) == 2
    runs = run_directories(longer, (3, 4), given.output_dir)
    assert runs_are_trained(runs).holds, "the diverged run counts, although it was planned to be shorter"
    lower = longer.optimization.model_copy(update={"learning_rate": 1e-4})
    (tmp_path / "config.json").write_text(longer.model_copy(update={"optimization": lower}).model_dump_json())
    with pytest.raises(InputError, match="the same optimization as the config to resume with"):
        train(dataclasses.replace(given, seeds=(4,), resume=True))
