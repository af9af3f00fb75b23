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
from tests.helpers.training import small_train_config, torch_step

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


def test_files_of_a_run(trained):
    """A run directory holds the files and rows that docs/formats.md names."""
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


def test_checkpoints_in_pytorch(trained):
    """PyTorch loads a checkpoint with the state of its optimizer."""
    document = load(trained / "seed_3", 16)
    module = module_of(document)
    assert list(document["model_state"]) == list(module.state_dict())
    optimizer = torch.optim.AdamW(module.parameters(), lr=1.0)
    optimizer.load_state_dict(document["optimizer_state"])
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (pytest.approx(3e-3), (0.9, 0.95), 0.01)
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape and int(state["step"]) == 16


def test_next_loss_in_pytorch(trained, small_benchmark):
    """PyTorch takes a step from our checkpoint, and then finds our next loss."""
    run, records = trained / "seed_3", read_lines(small_benchmark / "train.jsonl")
    document = load(run, 16)
    module = module_of(document)
    optimizer = torch.optim.AdamW(module.parameters())
    optimizer.load_state_dict(document["optimizer_state"])
    for rows, step in zip(batch_indices(3, 17, 2, num_records=80, batch_size=24), (17, 18), strict=True):
        loss = torch_step(module, optimizer, [records[i]["token_ids"] for i in rows if i >= 0])
        if step == 18:
            assert loss == pytest.approx(losses(run)[18], rel=1e-4)


def forget_after(run, step):
    """Leaves a run directory as an interruption after `step`, while more was logged, would."""
    for file in (run / "checkpoints").glob("step_*.pt"):
        if int(file.stem.removeprefix("step_")) > step:
            file.unlink()
    (run / "summary.json").unlink()


def test_resumed_losses(tmp_path, trained, small_benchmark):
    """A resumed run has the losses of the uninterrupted one."""
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


def test_resuming_a_pytorch_run(tmp_path, small_benchmark, trained):
    """Training goes on from steps 9 to 16 that PyTorch's AdamW took and saved."""
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


def test_recorded_accuracies(tmp_path, small_benchmark, trained):
    """Converted checkpoints have the accuracies that training recorded."""
    report = convert_run(
        RunDir.open(trained / "seed_4"), Benchmark.open(small_benchmark), verify="metrics", advance=lambda n: None
    )
    assert len(report.metric_checks) == 6  # three checkpoints, two tracked splits
    assert all(check.measured == check.recorded for check in report.metric_checks)


class TestBest:
    """The best checkpoint: by the metric, ties to the lower loss, then to the earlier step."""

    @pytest.fixture
    def recorder(self, tmp_path, small_benchmark):
        run = run_directories(small_train_config(small_benchmark), None, str(tmp_path / "run"))
        train_runs(run, Benchmark.open(small_benchmark), resume=False, overwrite=False, advance=lambda n: None)
        return tmp_path / "run"

    def test_best_of_the_recorded_rows(self, recorder):
        """best.pt is of the best row that was recorded."""
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
        """A tie of the metric goes to the lower loss; an equal candidate is not better."""
        from kvjax.pipeline.run_recorder import is_better

        best = {"answer_accuracy": 0.5, "loss": 2.0}
        assert is_better(candidate, best, small_train_config(small_benchmark).checkpointing) is expected
        assert is_better(candidate, None, small_train_config(small_benchmark).checkpointing)


def test_half_written_line(tmp_path, trained, small_benchmark):
    """A half-written last line of metrics.jsonl does not stop resuming."""
    train(small_benchmark, tmp_path)
    for seed in SEEDS:
        run = tmp_path / f"seed_{seed}"
        forget_after(run, 16)
        path = run / "metrics.jsonl"
        path.write_bytes(path.read_bytes()[:-20])
    train(small_benchmark, tmp_path, resume=True)
    assert losses(tmp_path / "seed_3").keys() == losses(trained / "seed_3").keys()


def test_resuming_a_finished_run(tmp_path, trained, small_benchmark):
    """Resuming a finished run changes nothing; more steps prolong it."""
    train(small_benchmark, tmp_path)
    train(small_benchmark, tmp_path, resume=True)
    ours, theirs = (json.loads((p / "seed_3" / "summary.json").read_text()) for p in (tmp_path, trained))
    assert ours["model_parameter_count"] == theirs["model_parameter_count"]
    assert losses(tmp_path / "seed_3") == losses(trained / "seed_3")
    train(small_benchmark, tmp_path, resume=True, num_steps=32)
    assert list(RunDir.open(tmp_path / "seed_3").checkpoints) == [8, 16, 24, 32]


def test_resuming_with_another_optimizer(tmp_path, trained, small_benchmark):
    """Resuming with another optimizer is refused."""
    optimization = small_train_config(small_benchmark).optimization.model_copy(update={"learning_rate": 1e-3})
    with pytest.raises(InputError, match=r"the same optimization as the config to resume with, .*; found "):
        train(small_benchmark, trained, resume=True, optimization=optimization.model_dump())


def test_resuming_with_another_curriculum(trained, small_benchmark):
    """The batches so far were drawn without it."""
    curriculum = [{"until_step": 30, "active_keys": {"min": 2, "max": 2}}]
    with pytest.raises(InputError, match=r"the same curriculum as the config to resume with, .*; found \(\)"):
        train(small_benchmark, trained, resume=True, num_steps=32, curriculum=curriculum)


def test_overwriting_several_runs(tmp_path, small_benchmark):
    """No run is overwritten if one of the directories holds no earlier run."""
    train(small_benchmark, tmp_path)
    (tmp_path / "seed_4" / "run_config.json").unlink()
    with pytest.raises(InputError, match="seed_4: expected an earlier run"):
        train(small_benchmark, tmp_path, overwrite=True)
    assert len(losses(tmp_path / "seed_3")) == 13


def test_adding_a_seed(tmp_path, small_benchmark):
    """Adding a seed leaves finished runs alone."""
    from kvjax.pipeline.train import train_missing_runs

    opened, settings = Benchmark.open(small_benchmark), small_train_config(small_benchmark)
    train_missing_runs(run_directories(settings, [3], str(tmp_path)), opened, advance=lambda n: None)
    kept = tmp_path / "seed_3" / "notes.txt"
    kept.write_text("mine")
    train_missing_runs(run_directories(settings, [3, 4], str(tmp_path)), opened, advance=lambda n: None)
    assert kept.exists() and (tmp_path / "seed_4" / "summary.json").is_file()


def test_resuming_without_step_checkpoints(tmp_path, small_benchmark, trained):
    """Runs without step checkpoints resume from their last one."""
    checkpointing = {"best_checkpoint_split": "validation_iid", "save_step_checkpoints": False}
    train(small_benchmark, tmp_path, checkpointing=checkpointing, num_steps=16)
    assert not list((tmp_path / "seed_3" / "checkpoints").glob("step_*"))
    train(small_benchmark, tmp_path, checkpointing=checkpointing, resume=True)
    for seed in SEEDS:
        ours, whole = losses(tmp_path / f"seed_{seed}"), losses(trained / f"seed_{seed}")
        np.testing.assert_allclose(list(ours.values()), list(whole.values()), rtol=1e-5)


def test_best_checkpoint_after_a_rewind(tmp_path, small_benchmark):
    """A rewound run's best.pt, missing or of a later step, is made from the rows kept."""
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


def test_resuming_from_a_foreign_checkpoint(tmp_path, small_benchmark):
    """A checkpoint of another step or benchmark is refused."""
    train(small_benchmark, tmp_path)
    for seed in SEEDS:
        forget_after(tmp_path / f"seed_{seed}", 16)
    other = write_small_benchmark(tmp_path / "other", seed=4)
    with pytest.raises(InputError, match="one trained on another"):
        train(other, tmp_path, resume=True)
    torch.save(load(tmp_path / "seed_4", 8), tmp_path / "seed_4" / "checkpoints" / "step_000016.pt")
    with pytest.raises(InputError, match="the checkpoint of step 16; found step 8"):
        train(small_benchmark, tmp_path, resume=True)


def test_checkpoint_of_the_last_step(tmp_path, small_benchmark):
    """The last step is saved, also between two checkpoint intervals."""
    train(small_benchmark, tmp_path, num_steps=21)
    assert list(RunDir.open(tmp_path / "seed_3").checkpoints) == [8, 16, 21]


def test_existing_runs(trained, small_benchmark):
    """Existing runs are kept unless overwriting is asked for."""
    before = (trained / "seed_3" / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"seed_3: expected an empty run directory"):
        train(small_benchmark, trained)
    assert (trained / "seed_3" / "metrics.jsonl").read_bytes() == before


def test_resuming_without_checkpoints(tmp_path, small_benchmark):
    """A run without checkpoints cannot be resumed."""
    train(small_benchmark, tmp_path)
    run = tmp_path / "seed_4"
    for file in (run / "checkpoints").glob("*.pt"):
        file.unlink()
    (run / "best_checkpoint.json").unlink()
    with pytest.raises(InputError, match="a checkpoint to resume from"):
        train(small_benchmark, tmp_path, resume=True)


def test_missing_tracked_split(small_benchmark):
    """A tracked split that the benchmark lacks is refused by name."""
    evaluation = {"batch_size": 8, "tracked_splits": ["validation"], "birth_thresholds": {}}
    evaluation["birth_thresholds"] = {"answer_accuracy": 0.9, "q": 0.2, "r": 0.2, "w": 1.0}
    changed = small_train_config(
        small_benchmark,
        evaluation=evaluation,
        checkpointing={"best_checkpoint_split": "validation"},
    )
    with pytest.raises(InputError, match="expected the tracked split validation"):
        Training([changed], Benchmark.open(small_benchmark))


@pytest.mark.parametrize("name", ["symbolic_kv_formation", "symbolic_kv_generalization", "symbolic_kv_quickstart"])
def test_shipped_configs(name):
    """Shipped configs are valid."""
    shipped = read_config(find_config(name, "train"), TrainConfig)
    assert shipped.run_name.startswith("symbolic_kv")


def test_reference_configs():
    """The reference configs hold the reference trainer's settings."""
    formation, generalization = (
        read_config(find_config(f"symbolic_kv_{name}", "train"), TrainConfig)
        for name in ("formation", "generalization")
    )
    assert (formation.seed, formation.batch_size, formation.num_steps) == (7, 128, 16000)
    assert formation.checkpoint_every_steps == 250 and generalization.checkpoint_every_steps == 1000
    assert not generalization.checkpointing.save_step_checkpoints
    assert formation.optimization == generalization.optimization
    assert formation.optimization.learning_rate == 4e-4 and formation.model.n_layers == 3


def test_train_evaluate_and_select(tmp_path, small_benchmark, capsys):
    """The commands train, evaluate and select, and refuse a misspelt field and a repeated seed."""
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
