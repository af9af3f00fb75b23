"""Runs of SGD on disk: PyTorch goes on from them, they from PyTorch, and a resume ends with the same bytes."""

import json
import shutil

import pytest
import torch
from kvjax.converters.torch_decoder import TorchDecoder

from kvjax.commands.main import main
from kvjax.config.run import ModelConfig
from kvjax.errors import InputError
from kvjax.pipeline.train import train_runs
from kvjax.task.benchmark import Benchmark
from kvjax.train.trainer import batch_indices
from tests.helpers.building import SMALL_MODEL, read_lines
from tests.helpers.training import SGD, small_train_config, torch_step

SEED = 3
WARMED = SGD | {"warmup_steps": 4}
RUNS = {"momentum": WARMED, "nesterov": WARMED | {"nesterov": True}, "none": WARMED | {"momentum": 0.0}}


def train(benchmark, runs, *, resume=False):
    """Trains runs, directory -> settings of the optimizer, as one program."""
    configs = {
        run: small_train_config(benchmark, optimization=optimization, output_dir=str(run))
        for run, optimization in runs.items()
    }
    return train_runs(configs, Benchmark.open(benchmark), resume=resume, overwrite=False, advance=lambda n: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_benchmark):
    """Whole runs: with momentum and without as one program, with Nesterov's look ahead as another."""
    folder = tmp_path_factory.mktemp("sgd")
    for names in (("momentum", "none"), ("nesterov",)):
        train(small_benchmark, {folder / name: RUNS[name] for name in names})
    return folder


def losses(run):
    return {row["step"]: row["loss"] for row in read_lines(run / "metrics.jsonl") if row["phase"] == "train"}


def checkpoint(run, step):
    return run / "checkpoints" / f"step_{step:06d}.pt"


def stop_at(run, step):
    """Takes back what a run wrote after a step, but for its log, as an interruption may leave it."""
    for path in (run / "checkpoints").glob("step_*.pt"):
        if path > checkpoint(run, step):
            path.unlink()
    (run / "summary.json").unlink()


def torch_steps(run, step, steps, records, name):
    """Takes steps in PyTorch from a checkpoint of a run; returns their losses, and the file's content after them."""
    document = torch.load(checkpoint(run, step), weights_only=True)
    module = TorchDecoder(ModelConfig.model_validate(SMALL_MODEL), document["model_state"]["lm_head.weight"].shape[0])
    module.lm_head.weight = module.token_embedding.weight
    module.load_state_dict(document["model_state"])
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    optimizer.load_state_dict(document["optimizer_state"])
    group, settings = optimizer.param_groups[0], RUNS[name]
    assert (group["momentum"], group["nesterov"]) == (settings["momentum"], settings.get("nesterov", False))
    found = []
    for rows in batch_indices(SEED, step + 1, steps, num_records=80, batch_size=24):
        found.append(torch_step(module, optimizer, [records[i]["token_ids"] for i in rows if i >= 0]))
    state = {"model_state": module.state_dict(), "optimizer_state": optimizer.state_dict()}
    return found, document | {"step": step + steps} | state


@pytest.mark.parametrize("name", RUNS)
def test_going_on_in_pytorch(trained, small_benchmark, name):
    """PyTorch's SGD takes eight steps from our checkpoint, and finds our losses and our next checkpoint."""
    run, records = trained / name, read_lines(small_benchmark / "train.jsonl")
    found, after = torch_steps(run, 8, 8, records, name)
    for step in (10, 12, 14, 16):
        assert found[step - 9] == pytest.approx(losses(run)[step], rel=1e-4)
    ours = torch.load(checkpoint(run, 16), weights_only=True)
    for key, tensor in after["model_state"].items():
        torch.testing.assert_close(ours["model_state"][key], tensor, rtol=1e-3, atol=1e-5, msg=key)
    assert ours["optimizer_state"]["state"].keys() == after["optimizer_state"]["state"].keys()
    for number, entry in after["optimizer_state"]["state"].items():
        assert list(ours["optimizer_state"]["state"][number]) == list(entry) == ["momentum_buffer"]
        ours_here = ours["optimizer_state"]["state"][number]["momentum_buffer"]
        torch.testing.assert_close(ours_here, entry["momentum_buffer"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_going_on_from_pytorch(tmp_path, trained, small_benchmark, name):
    """Training goes on from steps 9 to 16 that PyTorch's SGD took and saved."""
    run = tmp_path / name
    shutil.copytree(trained / name, run)
    after = torch_steps(run, 8, 8, read_lines(small_benchmark / "train.jsonl"), name)[1]
    stop_at(run, 8)
    torch.save(after, checkpoint(run, 16))
    train(small_benchmark, {run: RUNS[name]}, resume=True)
    for step in (18, 20, 22, 24):
        assert losses(run)[step] == pytest.approx(losses(trained / name)[step], rel=1e-3)


@pytest.mark.parametrize("names", [("momentum", "none"), ("nesterov",)], ids=" and ".join)
def test_bytes_after_a_resume(tmp_path, trained, small_benchmark, names):
    """A run that stopped and was resumed has the checkpoint files of the undisturbed one, byte for byte."""
    runs = {tmp_path / name: RUNS[name] for name in names}
    train(small_benchmark, runs)
    whole = {path: path.read_bytes() for run in runs for path in run.glob("checkpoints/*.pt")}
    assert len(whole) == 4 * len(runs)
    for run in runs:
        stop_at(run, 8)
    train(small_benchmark, runs, resume=True)
    assert [path for path, content in whole.items() if path.read_bytes() != content] == []
    for run in runs:
        rows = [row for row in read_lines(run / "metrics.jsonl") if row["phase"] != "resume"]
        assert rows == read_lines(trained / run.name / "metrics.jsonl")


def test_size_of_a_checkpoint(trained):
    """SGD keeps one array of every parameter, and without momentum none."""
    sizes = {name: checkpoint(trained / name, 24).stat().st_size for name in RUNS}
    assert sizes["none"] < 0.65 * sizes["momentum"] and sizes["momentum"] == sizes["nesterov"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, adamw: state.update(adamw), "expected the state of SGD, .*; found AdamW, or another optimizer"),
        (lambda state, adamw: state["param_groups"][0].update(dampening=0.5), "found SGD with dampening 0.5"),
        (lambda state, adamw: state["state"][5].clear(), "expected a tensor momentum_buffer of parameter 5"),
    ],
    ids=["AdamW", "dampening", "no buffer"],
)
def test_refused_resume(tmp_path, trained, small_benchmark, capsys, change, message):
    """A foreign or damaged optimizer state ends a resume with one line and status 2; no file is touched."""
    run = tmp_path / "run"
    shutil.copytree(trained / "momentum", run)
    (run / "summary.json").unlink()
    config = small_train_config(small_benchmark, optimization=WARMED)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    document = torch.load(checkpoint(run, 24), weights_only=True)
    parameter = torch.nn.Parameter(torch.ones(1))
    change(document["optimizer_state"], torch.optim.AdamW([parameter]).state_dict())
    torch.save(document, checkpoint(run, 24))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    arguments = ["train", f"--config={tmp_path / 'config.json'}", f"--output_dir={run}", "--resume", "--noprogress"]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    with pytest.raises(InputError, match=message):
        raise InputError(error)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_run_of_another_optimizer(trained, small_benchmark):
    """A run of SGD is not gone on with by a config of AdamW."""
    run = trained / "momentum"
    config = small_train_config(small_benchmark, output_dir=str(run))
    with pytest.raises(InputError, match=r"run_config.json: expected the same optimization as the config"):
        train_runs({run: config}, Benchmark.open(small_benchmark), resume=True, overwrite=False, advance=lambda n: None)


def test_recorded_optimizer(trained, small_benchmark):
    """A run of SGD records its optimizer; one of AdamW records none, as before there was a choice."""
    recorded = json.loads((trained / "momentum" / "run_config.json").read_text())["optimization"]
    assert recorded["optimizer"] == "sgd" and recorded["momentum"] == 0.9 and "beta1" not in recorded
    adamw = small_train_config(small_benchmark).model_dump(mode="json")["optimization"]
    assert list(adamw) == [
        *("learning_rate", "weight_decay", "beta1", "beta2", "eps", "grad_clip_norm", "warmup_steps", "schedule")
    ]
