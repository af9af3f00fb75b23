"""Training runs on disk: what PyTorch reads back, resuming, and what the run recorded of itself."""

import json

import numpy as np
import pytest
import torch
from kvjax.converters.convert_run import convert_run
from kvjax.converters.torch_decoder import TorchDecoder

from kvjax.artifacts.run_dir import RunDir
from kvjax.commands.main import main
from kvjax.config.files import find_config, read_config
from kvjax.config.run import ModelConfig
from kvjax.config.train import TrainConfig
from kvjax.errors import InputError
from kvjax.pipeline.train import run_directories, train_runs
from kvjax.task.benchmark import Benchmark
from kvjax.train.loop import Training
from kvjax.train.trainer import batch_indices
from tests.helpers.building import SMALL_MODEL, read_lines, write_small_benchmark
from tests.helpers.training import small_train_config

SEEDS = [3, 4]


def train(benchmark, folder, *, resume=False, overwrite=False, **changes):
    runs = run_directories(small_train_config(benchmark, **changes), SEEDS, str(folder))
    opened = Benchmark.open(benchmark)
    return train_runs(runs, opened, resume=resume, overwrite=overwrite, advance=lambda n: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_benchmark):
    folder = tmp_path_factory.mktemp("trained")
    train(small_benchmark, folder)
    return folder


def losses(run):
    return {row["step"]: row["loss"] for row in read_lines(run / "metrics.jsonl") if row["phase"] == "train"}


def load(run, step):
    return torch.load(run / "checkpoints" / f"step_{step:06d}.pt", weights_only=True)


def module_of(document):
    module = TorchDecoder(ModelConfig.model_validate(SMALL_MODEL), document["model_state"]["lm_head.weight"].shape[0])
    module.lm_head.weight = module.token_embedding.weight
    module.load_state_dict(document["model_state"])
    return module


def test_a_run_directory_holds_what_the_formats_say(trained):
    for seed in SEEDS:
        run = trained / f"seed_{seed}"
        opened = RunDir.open(run)
        assert list(opened.checkpoints) == [8, 16, 24] and opened.complete
        assert (opened.config.seed, opened.config.run_name) == (seed, f"trained_seed_{seed}")
        assert list(losses(run)) == [1, *range(2, 25, 2)]
        evaluations = [row for row in read_lines(run / "metrics.jsonl") if row["phase"] == "eval"]
        assert [(row["step"], row["split"]) for row in evaluations[:2]] == [(8, "validation_iid"), (8, "heldout_pairs")]
        assert json.loads((run / "summary.json").read_text())["model_parameter_count"] > 0
    assert losses(trained / "seed_3") != losses(trained / "seed_4")


def test_checkpoints_load_in_pytorch_with_their_optimizer(trained):
    document = load(trained / "seed_3", 16)
    module = module_of(document)
    assert list(document["model_state"]) == list(module.state_dict())
    optimizer = torch.optim.AdamW(module.parameters(), lr=1.0)
    optimizer.load_state_dict(document["optimizer_state"])
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (pytest.approx(3e-3), (0.9, 0.95), 0.01)
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape and int(state["step"]) == 16


def test_pytorch_goes_on_from_a_checkpoint_with_the_same_loss(trained, small_benchmark):
    """The next step's loss, recomputed by PyTorch after taking the step before it from our file."""
    run, records = trained / "seed_3", read_lines(small_benchmark / "train.jsonl")
    document = load(run, 16)
    module = module_of(document)
    optimizer = torch.optim.AdamW(module.parameters())
    optimizer.load_state_dict(document["optimizer_state"])
    for rows, step in zip(batch_indices(3, 17, 2, num_records=80, batch_size=24), (17, 18), strict=True):
        loss = torch_step(module, optimizer, [records[i]["token_ids"] for i in rows if i >= 0])
        if step == 18:
            assert loss == pytest.approx(losses(run)[18], rel=1e-4)


def torch_step(module, optimizer, sequences):
    """Takes one training step in PyTorch and returns its loss."""
    longest = max(map(len, sequences))
    batch = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
    logits = module(batch)[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), ignore_index=0)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def forget_after(run, step):
    """Leaves a run directory as an interruption after `step`, while more was logged, would."""
    for file in (run / "checkpoints").glob("step_*.pt"):
        if int(file.stem.removeprefix("step_")) > step:
            file.unlink()
    (run / "summary.json").unlink()


def test_resuming_gives_the_losses_of_the_uninterrupted_run(tmp_path, trained, small_benchmark):
    train(small_benchmark, tmp_path)
    for seed in SEEDS:
        forget_after(tmp_path / f"seed_{seed}", 8)
        best = tmp_path / f"seed_{seed}" / "best_checkpoint.json"
        best.unlink()
    train(small_benchmark, tmp_path, resume=True)
    for seed in SEEDS:
        resumed, whole = tmp_path / f"seed_{seed}", trained / f"seed_{seed}"
        assert losses(resumed).keys() == losses(whole).keys()
        np.testing.assert_allclose(list(losses(resumed).values()), list(losses(whole).values()), rtol=1e-5)
        phases = [row["phase"] for row in read_lines(resumed / "metrics.jsonl")]
        assert phases.count("resume") == 1
        for name in ("step", "metric_value"):
            records = [json.loads((run / "best_checkpoint.json").read_text())[name] for run in (resumed, whole)]
            assert records[0] == pytest.approx(records[1])


def test_resuming_from_what_pytorch_trained(tmp_path, small_benchmark, trained):
    """PyTorch takes steps 9 to 16 itself; training goes on from what its AdamW saved."""
    train(small_benchmark, tmp_path)
    records = read_lines(small_benchmark / "train.jsonl")
    for seed in SEEDS:
        run = tmp_path / f"seed_{seed}"
        document = load(run, 8)
        module = module_of(document)
        optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
        optimizer.load_state_dict(document["optimizer_state"])
        for rows in batch_indices(seed, 9, 8, num_records=80, batch_size=24):
            torch_step(module, optimizer, [records[i]["token_ids"] for i in rows if i >= 0])
        forget_after(run, 8)
        document |= {"step": 16, "model_state": module.state_dict(), "optimizer_state": optimizer.state_dict()}
        torch.save(document, run / "checkpoints" / "step_000016.pt")
    train(small_benchmark, tmp_path, resume=True)
    for seed in SEEDS:
        ours, whole = losses(tmp_path / f"seed_{seed}"), losses(trained / f"seed_{seed}")
        for step in (18, 20, 22, 24):
            assert ours[step] == pytest.approx(whole[step], rel=1e-3)


def test_the_accuracies_our_trainer_recorded_hold_for_its_checkpoints(tmp_path, small_benchmark, trained):
    report = convert_run(
        RunDir.open(trained / "seed_4"), Benchmark.open(small_benchmark), verify="metrics", advance=lambda n: None
    )
    assert len(report.metric_checks) == 6  # three checkpoints, two tracked splits
    assert all(check.measured == check.recorded for check in report.metric_checks)


class TestBest:
    """The best checkpoint: by the metric, ties to the lower loss, then to the earlier step."""

    @pytest.fixture
    def recorder(self, tmp_path, small_benchmark):
        from kvjax.converters import training

        run = training.run_directories(small_train_config(small_benchmark), None, str(tmp_path / "run"))
        training.train_runs(run, Benchmark.open(small_benchmark), resume=False, overwrite=False, advance=lambda n: None)
        return tmp_path / "run"

    def test_it_is_the_best_of_the_recorded_rows(self, recorder):
        rows = [r for r in read_lines(recorder / "metrics.jsonl") if r.get("split") == "validation_iid"]
        expected = min(rows, key=lambda r: (-r["answer_accuracy"], r["loss"], r["step"]))
        best = json.loads((recorder / "best_checkpoint.json").read_text())
        assert (best["step"], best["metric_value"]) == (expected["step"], expected["answer_accuracy"])
        assert torch.load(recorder / "checkpoints" / "best.pt", weights_only=True)["step"] == best["step"]

    @pytest.mark.parametrize(
        ("candidate", "expected"),
        [
            ({"answer_accuracy": 0.6, "loss": 9.0}, True),
            ({"answer_accuracy": 0.4, "loss": 0.1}, False),
            ({"answer_accuracy": 0.5, "loss": 1.9}, True),
            ({"answer_accuracy": 0.5, "loss": 2.0}, False),
            ({"answer_accuracy": 0.5, "loss": 2.1}, False),
        ],
    )
    def test_ties(self, small_benchmark, candidate, expected):
        from kvjax.pipeline.run_recorder import is_better

        best = {"answer_accuracy": 0.5, "loss": 2.0}
        assert is_better(candidate, best, small_train_config(small_benchmark).checkpointing) is expected
        assert is_better(candidate, None, small_train_config(small_benchmark).checkpointing)


def test_a_half_written_line_does_not_stop_resuming(tmp_path, trained, small_benchmark):
    train(small_benchmark, tmp_path)
    for seed in SEEDS:
        run = tmp_path / f"seed_{seed}"
        forget_after(run, 16)
        path = run / "metrics.jsonl"
        path.write_bytes(path.read_bytes()[:-20])
    train(small_benchmark, tmp_path, resume=True)
    assert losses(tmp_path / "seed_3").keys() == losses(trained / "seed_3").keys()


def test_resuming_a_finished_run_changes_nothing_but_can_prolong_it(tmp_path, trained, small_benchmark):
    train(small_benchmark, tmp_path)
    train(small_benchmark, tmp_path, resume=True)
    ours, theirs = (json.loads((p / "seed_3" / "summary.json").read_text()) for p in (tmp_path, trained))
    assert ours["model_parameter_count"] == theirs["model_parameter_count"]
    assert losses(tmp_path / "seed_3") == losses(trained / "seed_3")
    train(small_benchmark, tmp_path, resume=True, num_steps=32)
    assert list(RunDir.open(tmp_path / "seed_3").checkpoints) == [8, 16, 24, 32]


def test_resuming_with_another_optimiser_is_refused(tmp_path, trained, small_benchmark):
    optimization = small_train_config(small_benchmark).optimization.model_copy(update={"learning_rate": 1e-3})
    with pytest.raises(InputError, match="the same optimization as the config to resume with"):
        train(small_benchmark, trained, resume=True, optimization=optimization.model_dump())


def test_overwriting_checks_every_directory_before_the_first_is_replaced(tmp_path, small_benchmark):
    train(small_benchmark, tmp_path)
    (tmp_path / "seed_4" / "run_config.json").unlink()
    with pytest.raises(InputError, match="seed_4: expected an earlier run"):
        train(small_benchmark, tmp_path, overwrite=True)
    assert len(losses(tmp_path / "seed_3")) == 13


def test_adding_a_seed_leaves_finished_runs_alone(tmp_path, small_benchmark):
    from kvjax.pipeline.train import train_missing_runs

    opened, settings = Benchmark.open(small_benchmark), small_train_config(small_benchmark)
    train_missing_runs(run_directories(settings, [3], str(tmp_path)), opened, advance=lambda n: None)
    kept = tmp_path / "seed_3" / "notes.txt"
    kept.write_text("mine")
    train_missing_runs(run_directories(settings, [3, 4], str(tmp_path)), opened, advance=lambda n: None)
    assert kept.exists() and (tmp_path / "seed_4" / "summary.json").is_file()


def test_runs_without_step_checkpoints_resume_from_their_last(tmp_path, small_benchmark, trained):
    checkpointing = {"best_checkpoint_split": "validation_iid", "save_step_checkpoints": False}
    train(small_benchmark, tmp_path, checkpointing=checkpointing, num_steps=16)
    assert not list((tmp_path / "seed_3" / "checkpoints").glob("step_*"))
    train(small_benchmark, tmp_path, checkpointing=checkpointing, resume=True)
    for seed in SEEDS:
        ours, whole = losses(tmp_path / f"seed_{seed}"), losses(trained / f"seed_{seed}")
        np.testing.assert_allclose(list(ours.values()), list(whole.values()), rtol=1e-5)


def test_the_best_checkpoint_after_a_rewind_is_the_best_of_the_rows_kept(tmp_path, small_benchmark):
    """best.pt may be of a later step than training goes on from, or missing; here it is spoilt both ways."""
    train(small_benchmark, tmp_path)
    runs = [tmp_path / f"seed_{seed}" for seed in SEEDS]
    for run, spoil in zip(runs, ("unlink", "later"), strict=True):
        best = run / "checkpoints" / "best.pt"
        if spoil == "unlink":
            best.unlink()
        else:
            torch.save(load(run, 24), best)
        forget_after(run, 16)
        rows = [r for r in read_lines(run / "metrics.jsonl") if r.get("split") == "validation_iid" and r["step"] <= 16]
        expected = min(rows, key=lambda r: (-r["answer_accuracy"], r["loss"], r["step"]))["step"]
        # Prolonged by nothing: only the bookkeeping of resuming runs.
        train_runs(
            {run: small_train_config(small_benchmark, num_steps=16, seed=int(run.name[5:]))},
            Benchmark.open(small_benchmark),
            resume=True,
            overwrite=False,
            advance=lambda n: None,
        )
        assert json.loads((run / "best_checkpoint.json").read_text())["step"] == expected
        assert torch.load(best, weights_only=True)["step"] == expected


def test_a_checkpoint_of_another_step_or_benchmark_is_not_resumed_from(tmp_path, small_benchmark):
    train(small_benchmark, tmp_path)
    for seed in SEEDS:
        forget_after(tmp_path / f"seed_{seed}", 16)
    other = write_small_benchmark(tmp_path / "other", seed=4)
    with pytest.raises(InputError, match="one trained on another"):
        train(other, tmp_path, resume=True)
    torch.save(load(tmp_path / "seed_4", 8), tmp_path / "seed_4" / "checkpoints" / "step_000016.pt")
    with pytest.raises(InputError, match="the checkpoint of step 16; found step 8"):
        train(small_benchmark, tmp_path, resume=True)


def test_a_training_that_diverges_stops_with_one_line(tmp_path, small_benchmark):
    optimization = small_train_config(small_benchmark).optimization.model_copy(
        update={"learning_rate": 1e30, "warmup_steps": 0}
    )
    with pytest.raises(InputError, match="expected a finite loss and gradient"):
        train(small_benchmark, tmp_path, optimization=optimization.model_dump())


def test_the_last_step_is_saved_though_no_interval_ends_there(tmp_path, small_benchmark):
    train(small_benchmark, tmp_path, num_steps=21)
    assert list(RunDir.open(tmp_path / "seed_3").checkpoints) == [8, 16, 21]


def test_existing_runs_are_kept_unless_asked(trained, small_benchmark):
    before = (trained / "seed_3" / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"seed_3: expected an empty run directory"):
        train(small_benchmark, trained)
    assert (trained / "seed_3" / "metrics.jsonl").read_bytes() == before


def test_a_run_without_checkpoints_cannot_be_resumed(tmp_path, small_benchmark):
    train(small_benchmark, tmp_path)
    run = tmp_path / "seed_4"
    for file in (run / "checkpoints").glob("*.pt"):
        file.unlink()
    (run / "best_checkpoint.json").unlink()
    with pytest.raises(InputError, match="a checkpoint to resume from"):
        train(small_benchmark, tmp_path, resume=True)


def test_a_missing_tracked_split_is_named(small_benchmark):
    evaluation = {"batch_size": 8, "tracked_splits": ["validation"], "birth_thresholds": {}}
    evaluation["birth_thresholds"] = {"answer_accuracy": 0.9, "q": 0.2, "r": 0.2, "w": 1.0}
    changed = small_train_config(
        small_benchmark,
        evaluation=evaluation,
        checkpointing={"best_checkpoint_split": "validation"},
    )
    with pytest.raises(InputError, match="expected the tracked split validation"):
        Training(changed, Benchmark.open(small_benchmark), SEEDS)


@pytest.mark.parametrize("name", ["symbolic_kv_formation", "symbolic_kv_generalization", "symbolic_kv_quickstart"])
def test_shipped_configs_are_valid(name):
    shipped = read_config(find_config(name, "train"), TrainConfig)
    assert shipped.run_name.startswith("symbolic_kv")


def test_the_reference_configs_hold_the_reference_settings():
    formation, generalization = (
        read_config(find_config(f"symbolic_kv_{name}", "train"), TrainConfig)
        for name in ("formation", "generalization")
    )
    assert (formation.seed, formation.batch_size, formation.num_steps) == (7, 128, 16000)
    assert formation.checkpoint_every_steps == 250 and generalization.checkpoint_every_steps == 1000
    assert not generalization.checkpointing.save_step_checkpoints
    assert formation.optimization == generalization.optimization
    assert formation.optimization.learning_rate == 4e-4 and formation.model.n_layers == 3


def test_commands_train_evaluate_and_select(tmp_path, small_benchmark, capsys):
    path = tmp_path / "config.json"
    document = small_train_config(small_benchmark, num_steps=8).model_dump(mode="json")
    path.write_text(json.dumps(document))
    runs = tmp_path / "runs"
    assert main(["train", f"--config={path}", "--seeds=3,4", f"--output_dir={runs}", "--noprogress"]) == 0
    assert main(["evaluate", f"--run_dirs={runs}/*", "--checkpoint=final", "--noprogress"]) == 0
    for seed in SEEDS:
        evaluation = json.loads((runs / f"seed_{seed}" / "analysis" / "evaluation" / "final.json").read_text())
        recorded = [r for r in read_lines(runs / f"seed_{seed}" / "metrics.jsonl") if r.get("split") == "heldout_pairs"]
        assert evaluation["splits"]["heldout_pairs"]["loss"] == pytest.approx(recorded[-1]["loss"])
        assert set(evaluation["splits"]) == {
            "validation_iid",
            "test_iid",
            "heldout_pairs",
            "structural_ood",
            "counterfactual",
        }
    output = tmp_path / "ranking.json"
    flags = [f"--run_dirs={runs}/*", "--min_validation_answer_accuracy=0", f"--output={output}", "--noprogress"]
    assert main(["select-reference", *flags]) == 0
    ranking = json.loads(output.read_text())
    assert ranking["selected"] == ranking["candidates"][0]["run_dir"]
    capsys.readouterr()
    path.write_text(json.dumps(document | {"leaning_rate": 1}))
    assert main(["train", f"--config={path}", f"--output_dir={tmp_path / 'x'}"]) == 2
    assert "leaning_rate" in capsys.readouterr().err
    assert main(["train", f"--config={path}", "--seeds=3,3"]) == 2
