"""What a resume reads before it touches a file, and what starting over removes; nothing here trains."""

import errno
import hashlib
import json
import shutil
from pathlib import Path

import jax
import optax
import pytest
import torch
from kvjax.converters.torch_checkpoint import write_checkpoint
from kvjax.converters.torch_decoder import TorchDecoder

from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.training_log import TrainingLog
from kvjax.commands.main import main
from kvjax.config.run import ModelConfig
from kvjax.errors import InputError, Note
from kvjax.pipeline.background_writer import BackgroundWriter
from kvjax.pipeline.run_history import RunHistory, is_better
from kvjax.pipeline.run_recorder import FileRecorder
from kvjax.pipeline.train import train_runs
from kvjax.task.benchmark import Benchmark
from kvjax.train.loop import Training
from kvjax.train.memory import parameter_count
from kvjax.train.schedule import accumulators_of
from tests.helpers.building import SMALL_MODEL, read_lines
from tests.helpers.training import small_train_config

END = 16


def evaluation(step, accuracy, split="validation_iid"):
    return {"phase": "eval", "split": split, "step": step, "answer_accuracy": accuracy, "loss": 2.0 - accuracy}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, small_benchmark):
    """A run of 16 steps that PyTorch took, with checkpoints at 8 and 16."""
    run = tmp_path_factory.mktemp("finished") / "run"
    metadata = json.loads((small_benchmark / "metadata.json").read_text())
    config = small_train_config(small_benchmark, num_steps=END).model_dump(mode="json")
    module = TorchDecoder(ModelConfig.model_validate(SMALL_MODEL), len(metadata["vocabulary"]["tokens"]))
    module.lm_head.weight = module.token_embedding.weight
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    (run / "checkpoints").mkdir(parents=True)
    (run / "run_config.json").write_text(json.dumps(config))
    rows = []
    for step in range(1, END + 1):
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        rows.append({"phase": "train", "step": step, "loss": 2.0})
        if step % 8 == 0:
            rows += [evaluation(step, step / 100), evaluation(step, 0.5, "heldout_pairs")]
            document = {"step": step, "model_state": module.state_dict(), "optimizer_state": optimizer.state_dict()}
            document["config"] = {"train_spec": config, "benchmark_metadata": metadata}
            torch.save(document, run / "checkpoints" / f"step_{step:06d}.pt")
    shutil.copy(run / "checkpoints" / "step_000016.pt", run / "checkpoints" / "best.pt")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "best_checkpoint.json").write_text(json.dumps({"path": "best.pt", "step": END}))
    (run / "summary.json").write_text("{}")
    return run


@pytest.fixture
def writer():
    with BackgroundWriter(pending=1) as writer:
        yield writer


@pytest.fixture
def run(finished_run, tmp_path):
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def resume(run, benchmark, **changes):
    config = small_train_config(benchmark, **({"num_steps": END, "output_dir": str(run)} | changes))
    return train_runs({run: config}, Benchmark.open(benchmark), resume=True, overwrite=False, advance=lambda n: None)


def contents(folder):
    """Returns the hash of every file of a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def edit_row(number, **changes):
    """Returns a change of a row of the log, by its line's number; None removes a field."""

    def edit(run):
        rows = read_lines(run / "metrics.jsonl")
        row = rows[number - 1] | changes
        rows[number - 1] = {name: value for name, value in row.items() if value is not None}
        (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))

    return edit


def edit_state(edit):
    """Returns a change of the optimizer's state in the last checkpoint."""

    def change(run):
        path = run / "checkpoints" / "step_000016.pt"
        document = torch.load(path, weights_only=True)
        edit(document["optimizer_state"])
        torch.save(document, path)

    return change


# Line 9 is the evaluation of validation_iid at step 8.
REFUSED = {
    "no phase": (edit_row(9, phase=None), r"metrics.jsonl:9: expected a row with a phase, and a step"),
    "text step": (edit_row(3, step="3"), r"metrics.jsonl:3: expected a row with a phase, and a step"),
    "infinite step": (edit_row(3, step=float("inf")), r"metrics.jsonl:3: expected a row with a phase, and a step"),
    "no loss": (edit_row(9, loss=None), r"metrics.jsonl:9: expected an evaluation with a number as loss; found None"),
    "text accuracy": (edit_row(9, answer_accuracy="1"), "an evaluation with a number as answer_accuracy; found '1'"),
    "number beyond floats": (edit_row(9, loss=10**400), "an evaluation with a number as loss; found 1000"),
    "no split": (edit_row(9, split=None), "metrics.jsonl:9: expected an evaluation of a split"),
    "torn line": (lambda run: (run / "metrics.jsonl").write_text('{"ph\n{}\n'), "metrics.jsonl:1: expected a JSON"),
    "infinite optimizer step": (
        edit_state(lambda state: state["state"][0].update(step=torch.tensor(float("inf")))),
        "step_000016.pt: expected a whole number of steps",
    ),
    "list state": (edit_state(lambda state: state.update(state=[1, 2, 3])), "a mapping of parameters; found list"),
    "amsgrad": (edit_state(lambda state: state["param_groups"][0].update(amsgrad=True)), "found AdamW with amsgrad"),
    "config": (lambda run: (run / "run_config.json").write_text("{}"), "run_config.json: expected a field"),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_resume(run, small_benchmark, damage, message):
    """A refused resume leaves every file as it was, the summary of the finished run too."""
    damage(run)
    before = contents(run)
    with pytest.raises(InputError, match=message):
        resume(run, small_benchmark)
    assert contents(run) == before


def test_resume_that_ends_before_it_begins(run, small_benchmark):
    """A resume that is planned to end before the latest checkpoint is refused; nothing changes."""
    before = contents(run)
    with pytest.raises(InputError, match="run: expected num_steps of at least 16, which the run has reached; found 8"):
        resume(run, small_benchmark, num_steps=8)
    assert contents(run) == before


def test_resume_without_disk(run, small_benchmark, monkeypatch):
    """A resume without room for a checkpoint is refused; nothing changes."""
    before = contents(run)
    usage = type(shutil.disk_usage(run))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(InputError, match=r"run: expected 0.\d MB of free disk for checkpoints; found 0.0 MB"):
        resume(run, small_benchmark)
    assert contents(run) == before


@pytest.mark.parametrize("split", ["train", "heldout_pairs"])
@pytest.mark.parametrize("resumed", [True, False])
def test_damaged_split(run, small_benchmark, tmp_path, split, resumed):
    """A damaged split of those that training needs is refused before a run directory is made or touched."""
    benchmark = Path(shutil.copytree(small_benchmark, tmp_path / "benchmark"))
    records = read_lines(benchmark / f"{split}.jsonl")
    records[3]["tokens"][1] = "nothing"
    (benchmark / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    before = contents(run)
    config = small_train_config(benchmark, num_steps=END)
    path = run if resumed else tmp_path / "fresh"
    with pytest.raises(InputError):
        train_runs({path: config}, Benchmark.open(benchmark), resume=resumed, overwrite=False, advance=lambda n: None)
    assert contents(run) == before and not (tmp_path / "fresh").exists()


def test_rows_kept(run, small_benchmark):
    """Kept rows stay as they were written, NaN included; the summary has null in its place."""
    edit_row(9, answer_margin=float("nan"))(run)
    edit_row(2, note="é", loss=float("inf"))(run)
    edit_row(20, answer_margin=float("nan"))(run)
    before = (run / "metrics.jsonl").read_bytes()
    resume(run, small_benchmark)
    after = (run / "metrics.jsonl").read_bytes()
    assert b"NaN" in before and b"Infinity" in before and after.startswith(before)
    assert json.loads(after[len(before) :]) == {"phase": "resume", "step": END, "num_steps": END}
    final = json.loads((run / "summary.json").read_text())["final"]
    assert final["heldout_pairs"]["answer_margin"] is None and final["validation_iid"]["answer_accuracy"] == 0.16


def test_optimizer_of_other_steps(run, small_benchmark, monkeypatch):
    """An optimizer that has taken fewer steps goes on with its own count, and so in the next file; that is noted."""
    edit_state(lambda state: [entry.update(step=15) for entry in state["state"].values()])(run)
    taken = []

    def one_step(training, states, recorders, **_):
        """Stands in for training: saves the state of step 17 as it was read, which is all that matters here."""
        (state,), (recorder,) = states, recorders
        taken.append(state.optimizer)
        recorder.save(17, state.params, accumulators_of(state.optimizer), {})

    monkeypatch.setattr(Training, "run", one_step)
    with pytest.warns(Note, match=r"step_000016.pt: its optimizer has taken 15 steps, not 16"):
        resume(run, small_benchmark, num_steps=17)
    counts = {
        type(part).__name__: int(part.count) for part in jax.tree.leaves(taken, is_leaf=has_count) if has_count(part)
    }
    assert counts == {"ScaleByAdamState": 15, "ScaleByScheduleState": 16}
    written = torch.load(run / "checkpoints" / "step_000017.pt", weights_only=True)["optimizer_state"]["state"]
    assert {float(entry["step"]) for entry in written.values()} == {16.0}


def has_count(part):
    return isinstance(part, optax.ScaleByAdamState | optax.ScaleByScheduleState)


def test_resume_of_a_finished_run(run, small_benchmark, monkeypatch):
    """A run that had ended keeps its summary if the resume cannot write another."""

    def no_room(recorder):
        raise InputError("no room")

    before = (run / "summary.json").read_bytes()
    monkeypatch.setattr(FileRecorder, "finish", no_room)
    with pytest.raises(InputError, match="no room"):
        resume(run, small_benchmark)
    assert (run / "summary.json").read_bytes() == before and RunDir.open(run).complete


def test_rows_of_a_rewind(run, small_benchmark, writer):
    """Going on from an earlier step drops the rows beyond it, and the best checkpoint is one of those left."""
    (run / "checkpoints" / "step_000016.pt").unlink()
    recorder = FileRecorder(run, small_train_config(small_benchmark, num_steps=24), 0, {}, writer)
    for path in partials(run):
        path.write_bytes(b"x")
    recorder.go_on(RunHistory.of(RunDir.open(run).log, 8, recorder.config.checkpointing))
    assert not any(path.exists() for path in partials(run))
    opened = RunDir.open(run)
    assert max(row.step for row in opened.log.rows) == 8 and (opened.planned_steps, opened.complete) == (24, False)
    assert not (run / "summary.json").exists() and opened.best_checkpoint()[0] == 8
    assert torch.load(run / "checkpoints" / "best.pt", weights_only=True)["step"] == 8


@pytest.mark.parametrize("name", ["answer_accuracy", "loss"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_evaluation_that_is_never_the_best(tmp_path, small_benchmark, name, value):
    """An evaluation without a finite metric and loss is not the best, also if it is the first or the only one."""
    path = tmp_path / "metrics.jsonl"
    rows = [evaluation(8, 0.5) | {name: value}, evaluation(16, 0.1), evaluation(24, 0.9) | {name: value}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpointing = small_train_config(small_benchmark).checkpointing
    assert RunHistory.of(TrainingLog.read(path), 24, checkpointing).best["step"] == 16
    assert not is_better(rows[0], None, checkpointing)


def partials(run):
    """Names what trainings leave that are killed while they write a checkpoint."""
    return [run / "checkpoints" / f".{name}.pt.abcd1234.kvjax-partial" for name in ("step_000008", "best", "last")]


def test_starting_over(run, small_benchmark, tmp_path, writer):
    """Starting over removes what training wrote, and the analysis with a note; other files stay."""
    kept = [run / "my_notes.txt", run / "checkpoints" / "mine.pt", run / "plots" / "loss.png"]
    gone = [run / "analysis" / "sweep.json", run / "checkpoints" / "last.pt", *partials(run)]
    for path in (*kept, *gone):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    config = small_train_config(small_benchmark, num_steps=40)
    with pytest.warns(Note, match=r"analysis was removed: it measured the run that is overwritten"):
        FileRecorder(run, config, 0, {}, writer).begin()
    left = {path for path in run.rglob("*") if path.is_file()}
    assert left == {run / "run_config.json", *kept}
    assert RunDir.open(run).config.num_steps == 40
    FileRecorder(tmp_path / "fresh", config, 0, {}, writer).begin()
    assert sorted(path.name for path in (tmp_path / "fresh").iterdir()) == ["checkpoints", "run_config.json"]


def test_checkpoint_on_a_full_disk(run, monkeypatch):
    """A checkpoint that finds the disk full is one line that names it; the earlier file stays, and no part is left."""
    before = contents(run)

    def full(path, content):
        path.open("wb").close()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    path = run / "checkpoints" / "step_000016.pt"
    with pytest.raises(InputError, match=r"step_000016.pt: expected a file that can be written; found .*No space left"):
        write_checkpoint(path, step=END, state={}, config={}, metrics={})
    assert contents(run) == before


def test_log_on_a_full_disk(run, small_benchmark, writer):
    """A row that finds the disk full is one line that names the log."""
    recorder = FileRecorder(run, small_train_config(small_benchmark), 0, {}, writer)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"metrics.jsonl: expected a file that can be written; found .*No space left"):
        recorder.log({"phase": "train", "step": 1})


def test_training_beyond_memory(small_benchmark, monkeypatch):
    """A training that cannot fit into memory is refused with the numbers: 16 bytes a parameter and run."""
    opened, config = Benchmark.open(small_benchmark), small_train_config(small_benchmark)
    parameters = parameter_count(Training([config], opened).decoder)
    monkeypatch.setattr("kvjax.train.memory.available_memory_bytes", lambda: 4e7)
    Training([config], opened)
    runs = int(4e7 / 16 / parameters) + 1
    with pytest.raises(InputError, match=rf"fits into 40 MB of memory; found 40\.?\d* MB .* optimizer of {runs} runs"):
        Training([config] * runs, opened)
    often = {"log_every_steps": 10**6, "eval_every_steps": 10**6, "checkpoint_every_steps": 10**6, "num_steps": 10**6}
    with pytest.raises(InputError, match=r"and 96 MB for the batches of 1000000 steps"):  # 24 numbers of 4 bytes each
        Training([small_train_config(small_benchmark, **often)], opened)


@pytest.mark.parametrize(
    ("part", "name", "text"),
    [
        ("optimization", "learning_rate", "Infinity"),
        ("optimization", "weight_decay", "NaN"),
        ("optimization", "eps", "0"),
        ("optimization", "warmup_steps", "1" + "0" * 400),
        (None, "num_steps", "1" + "0" * 400),
        (None, "batch_size", "1" + "0" * 400),
        (None, "batch_size", "1000000000"),
        ("model", "d_model", "10000000"),
    ],
)
def test_config_that_cannot_run(tmp_path, small_benchmark, capsys, part, name, text):
    """Numbers that no training can run with are one line and status 2 at once; no directory is made."""
    document = small_train_config(small_benchmark).model_dump(mode="json")
    (document[part] if part else document)[name] = "HERE"
    path = tmp_path / "train.json"
    path.write_text(json.dumps(document).replace('"HERE"', text))
    assert main(["train", f"--config={path}", f"--output_dir={tmp_path / 'run'}", "--noprogress"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and name in error and not (tmp_path / "run").exists()
