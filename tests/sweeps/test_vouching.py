"""Recorded accuracies vouch for the number of heads, LayerNorm's epsilon and the form of GELU, or contradict them."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from kvjax.converters.convert import convert_checkpoint
from kvjax.converters.convert_run import convert_run
from kvjax.converters.torch_decoder import TorchDecoder

from kvjax.artifacts.run_dir import RunDir
from kvjax.config.run import ModelConfig
from kvjax.errors import InputError
from kvjax.sweeps.vouching import CountedAnswers, RecordedAccuracy, Voucher, judge, recorded_accuracies
from kvjax.task.benchmark import Benchmark
from tests.helpers.building import SMALL_MODEL, fit_read_out, random_torch_model, read_lines, recorded_evaluation
from tests.helpers.sweeping import sweep

LAST = 300
GELU = torch.nn.functional.gelu


def last_of(run):
    return run / "checkpoints" / f"step_{LAST:06d}.pt"


def rewrite(path, change):
    """Changes the document of a checkpoint file."""
    document = torch.load(path, weights_only=True)
    change(document)
    torch.save(document, path)


def vouch(run, benchmark_dir, *, refuse=True):
    """Compares the last checkpoint of a run; returns what vouches, and why nothing does."""
    opened, benchmark = RunDir.open(run), Benchmark.open(benchmark_dir)
    checkpoint = convert_checkpoint(last_of(run), opened.config, benchmark)
    voucher = Voucher(opened, benchmark, refuse=refuse, way_on="contradiction=note")
    voucher.start(checkpoint)
    return voucher.finish(checkpoint), voucher.reason


def test_sound_run(small_run, small_benchmark):
    """The accuracy that PyTorch counted while the run was written is found again, and its file named."""
    (row,) = [row for row in read_lines(small_run / "metrics.jsonl") if row["step"] == LAST]
    vouched, _ = vouch(small_run, small_benchmark)
    assert (vouched.source, vouched.step, vouched.split) == ("metrics.jsonl", LAST, "validation_iid")
    assert vouched.recorded == row["answer_accuracy"] == pytest.approx(vouched.found, abs=1e-9)
    assert vouched.num_reads == row["num_examples"] and vouched.differs is None
    assert str(vouched).startswith("metrics.jsonl vouches for the architecture: answer_accuracy on validation_iid")


def test_checkpoints_that_are_compared(small_run, small_benchmark):
    """A run that answers little at first is compared again when its recorded accuracy has doubled, and only then."""
    opened, benchmark = RunDir.open(small_run), Benchmark.open(small_benchmark)
    voucher = Voucher(opened, benchmark, refuse=False, way_on="contradiction=note")
    (row,) = [row for row in read_lines(small_run / "metrics.jsonl") if row["step"] == LAST]
    recorded = {100: 0.01, 200: 0.019, 300: 0.02, 400: 0.039, 500: 0.9}
    rows = [row | {"step": step, "answer_accuracy": accuracy} for step, accuracy in recorded.items()]
    (small_run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    last = convert_checkpoint(last_of(small_run), opened.config, benchmark)
    checkpoints = [dataclasses.replace(last, step=step, path=Path(f"step_{step}.pt")) for step in recorded]
    for checkpoint in checkpoints:
        voucher.start(checkpoint)
    compared = {checkpoint.step: voucher.finish(checkpoint) for checkpoint in checkpoints}
    assert [step for step, vouched in compared.items() if vouched is not None] == [100, 300, 500]
    assert compared[500].recorded == 0.9 and voucher.reason is None


def other_heads(run, benchmark):
    """The config names another number of heads, and the files record none."""
    config = json.loads((run / "run_config.json").read_text())
    config["model"]["n_heads"] = 2
    (run / "run_config.json").write_text(json.dumps(config))


def tanh_gelu(run, benchmark):
    """The run was trained with the tanh form of GELU, and its last MLP shows how far the two forms are apart."""
    retrained(run, benchmark, amplify_the_difference, approximate="tanh")


def other_epsilon(run, benchmark):
    """The run was trained with another epsilon, on a residual stream so small that it matters."""
    retrained(run, benchmark, lambda module: scale_embeddings(module, 1e-2), epsilon=1e-2)


def amplify_the_difference(module):
    """Sets the last MLP to neurons of one input whose sum nearly cancels in the tanh form alone."""
    feed_forward = module.blocks[-1].ff
    neurons, width = feed_forward.fc_in.weight.shape
    slopes, shifts = (np.linspace(*ends, neurons) for ends in ((0.5, 1.5), (-2, 2)))
    before = torch.from_numpy(np.linspace(-4, 4, 400)[:, None] * slopes + shifts)
    tanh, exact = (GELU(before, approximate=form).numpy() for form in ("tanh", "none"))
    size = tanh.T @ tanh / 400 + 1e-10 * np.eye(neurons)  # float32 cancels no further
    _, directions = scipy.linalg.eigh((exact - tanh).T @ (exact - tanh) / 400, size)
    feed_forward.fc_in.weight.copy_(torch.from_numpy(np.outer(slopes, np.eye(width)[0])))
    feed_forward.fc_in.bias.copy_(torch.from_numpy(shifts))
    feed_forward.fc_out.weight.copy_(torch.from_numpy(30 * np.outer(np.linspace(-1, 1, width), directions[:, -1])))
    feed_forward.fc_out.bias.zero_()


def scale_embeddings(module, factor):
    module.token_embedding.weight.mul_(factor)
    module.position_embedding.weight.mul_(factor)


def retrained(run, benchmark, change, *, approximate="none", epsilon=1e-5):
    """Replaces the last checkpoint by that of a model of another architecture, and records its accuracy."""
    validation = read_lines(benchmark / "validation_iid.jsonl")
    vocabulary = json.loads((benchmark / "metadata.json").read_text())["vocabulary"]
    module = random_torch_model(SMALL_MODEL, len(vocabulary["tokens"]), 1, tied=False)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "gelu", lambda x: GELU(x, approximate=approximate))
        change(module)
        for part in module.modules():
            if isinstance(part, torch.nn.LayerNorm):
                part.eps = epsilon
        fit_read_out(module, validation)
        row = recorded_evaluation(module, validation, LAST)
    rewrite(last_of(run), lambda document: document.update(model_state=module.state_dict()))
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert row["answer_accuracy"] > 0.1, "an accuracy at chance could vouch for little"


@pytest.mark.parametrize("fault", [other_heads, tanh_gelu, other_epsilon])
def test_architecture_no_tensor_shows(small_run, small_benchmark, fault):
    """A contradiction of the recorded accuracy is refused with both numbers and the remedy, or noted if asked."""
    for path in (small_run / "checkpoints").glob("step_*.pt"):
        rewrite(path, lambda document: document["config"].pop("train_spec"))
    fault(small_run, small_benchmark)
    complaint = (
        r"step_000300.pt: expected answer_accuracy 0\.\d+ on validation_iid, as metrics.jsonl records; found 0\."
    )
    with pytest.raises(InputError, match=complaint):
        vouch(small_run, small_benchmark)
    vouched, _ = vouch(small_run, small_benchmark, refuse=False)
    assert vouched.differs.startswith("step_000300.pt and metrics.jsonl differ in answer_accuracy on validation_iid")


def test_conversion_of_a_run(small_run, small_benchmark):
    """Converting a run compares its latest checkpoint, refuses a contradiction, and goes on without verification."""

    def convert(verify):
        opened, benchmark = RunDir.open(small_run), Benchmark.open(small_benchmark)
        return convert_run(opened, benchmark, verify=verify, advance=lambda n: None)

    assert convert("sample").vouched.step == LAST
    for path in (small_run / "checkpoints").glob("step_*.pt"):
        rewrite(path, lambda document: document["config"].pop("train_spec"))
    other_heads(small_run, small_benchmark)
    with pytest.raises(InputError, match="or go on with `verify=none`"):
        convert("sample")
    report = convert("none")
    assert report.vouched is None and report.notes == []
    no_log(small_run)
    (note,) = convert("sample").notes
    assert note.startswith("nothing vouches for n_heads, ") and "recorded no accuracy" in note


def test_sweep_of_a_contradicted_run(small_run):
    """A sweep refuses it before anything is kept; with a note it is measured, and nothing vouches for it."""
    (row,) = [row for row in read_lines(small_run / "metrics.jsonl") if row["step"] == LAST]
    row["answer_accuracy"] = 0.9 if row["answer_accuracy"] < 0.5 else 0.1
    (small_run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=r"as metrics.jsonl records; .* or go on with `contradiction=note`"):
        sweep(small_run)
    assert not (small_run / "analysis" / "measured").exists()
    report = sweep(small_run, contradiction="note")
    assert any("differ in answer_accuracy" in note for note in report.notes)


def test_sweep_of_a_sound_run(swept, capsys):
    """`sweep.json` holds what vouches for the run, on the reference checkpoint."""
    document = json.loads((swept / "analysis" / "sweep.json").read_text())
    assert document["vouched"]["step"] == LAST and document["vouched"]["differs"] is None
    assert not any("vouches" in note for note in document["notes"])


def no_log(run):
    (run / "metrics.jsonl").unlink()


def other_count(run):
    rows = [{**row, "num_examples": row["num_examples"] + 1} for row in read_lines(run / "metrics.jsonl")]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def other_benchmark(run):
    rewrite(last_of(run), lambda document: document["config"]["benchmark_metadata"].update(seed=99))


def damaged_log(run):
    (run / "metrics.jsonl").write_text("{\n{}\n")


def missing_split(run):
    rows = [{**row, "split": "unknown"} for row in read_lines(run / "metrics.jsonl")]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (no_log, "recorded no accuracy"),
        (other_count, "which has another number"),
        (other_benchmark, "trained on another benchmark, or its seed changed"),
        (damaged_log, "metrics.jsonl:1: expected a JSON object"),
        (missing_split, "records of split unknown"),
    ],
)
def test_nothing_to_vouch(small_run, small_benchmark, change, reason):
    """What cannot be compared refuses nothing, and says why."""
    change(small_run)
    vouched, why = vouch(small_run, small_benchmark)
    assert vouched is None and reason in why


def test_accuracies_in_the_file(small_run, small_benchmark):
    """What stands in the checkpoint's file comes before the log; entries without numbers are passed over."""
    (row,) = [row for row in read_lines(small_run / "metrics.jsonl") if row["step"] == LAST]
    metrics = {"heldout_pairs": {"answer_accuracy": "high"}, "validation_iid": {**row, "loss": 2.5}, "note": "text"}
    rewrite(last_of(small_run), lambda document: document.update(metrics=metrics))
    opened = RunDir.open(small_run)
    checkpoint = convert_checkpoint(last_of(small_run), opened.config, Benchmark.open(small_benchmark))
    (found,) = recorded_accuracies(opened, checkpoint)
    expected = row["answer_accuracy"], row["num_examples"]
    assert found == RecordedAccuracy("step_000300.pt", "validation_iid", *expected, 2.5)
    vouched, _ = vouch(small_run, small_benchmark)
    assert vouched.source == "step_000300.pt" and "differ in losses (2.5000 recorded, " in vouched.differs


@pytest.mark.parametrize(
    ("right", "near_ties", "loss", "verdict"),
    [
        *((500, 0, 1.0, "agrees"), (498, 0, 1.0005, "agrees"), (497, 0, 1.0, "differs"), (500, 0, 1.01, "differs")),
        *((478, 0, 1.0, "differs"), (477, 0, 1.0, "contradicts"), (477, 1, 1.0, "differs")),
        (523, 0, 1.0, "contradicts"),
    ],
)
def test_verdicts_by_hand(right, near_ties, loss, verdict):
    """Two flipped answers agree; beyond 2 % of 1000 reads, near-ties and two more, they contradict."""
    recorded = RecordedAccuracy("metrics.jsonl", "validation_iid", 0.5, 1000, 1.0)
    assert judge(recorded, CountedAnswers(right, near_ties, 1000, loss))[0] == verdict


def test_loss_against_pytorch(small_run, small_benchmark):
    """The counted loss is PyTorch's mean over next tokens."""
    records = read_lines(small_benchmark / "validation_iid.jsonl")
    state = torch.load(last_of(small_run), weights_only=True)["model_state"]
    module = TorchDecoder(ModelConfig.model_validate(SMALL_MODEL), state["token_embedding.weight"].shape[0])
    module.load_state_dict(state)
    with torch.no_grad():
        parts = [
            torch.nn.functional.cross_entropy(module(tokens)[0, :-1], tokens[0, 1:], reduction="sum").item()
            for tokens in (torch.tensor([record["token_ids"]]) for record in records)
        ]
    loss = math.fsum(parts) / sum(len(record["token_ids"]) - 1 for record in records)
    rows = [{**row, "loss": loss} for row in read_lines(small_run / "metrics.jsonl")]
    (small_run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert vouch(small_run, small_benchmark)[0].differs is None
