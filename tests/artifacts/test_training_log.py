"""`metrics.jsonl` as interrupted and resumed trainings leave it, and what a run's plan is after a resume."""

import json

import pytest

from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.training_log import TrainingLog
from kvjax.errors import InputError, Note


def row(step, accuracy=None, split="validation_iid"):
    """Returns a training row, or an evaluation with an accuracy."""
    if accuracy is None:
        return {"phase": "train", "step": step, "loss": 1.0}
    return {"phase": "eval", "step": step, "split": split, "answer_accuracy": accuracy}


def resume(step, **more):
    return {"phase": "resume", "step": step, **more}


def written(path, *rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


@pytest.fixture
def log(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_rows_after_a_resume(log):
    """Rows after a resume replace earlier rows of later steps, more than once, and no others."""
    first = [row(1), row(8, 0.1), row(9), row(16, 0.2), row(24, 0.3)]
    second = [resume(8), row(9), row(16, 0.5), row(16, 0.6, "heldout_pairs")]
    third = [resume(8), row(16, 0.7)]
    written(log, *first, *second, *third)
    read = TrainingLog.read(log)
    kept = [(one.phase, one.step) for one in read.rows]
    assert kept == [("train", 1), ("eval", 8), ("resume", 8), ("resume", 8), ("eval", 16)]
    assert [(e["step"], e["answer_accuracy"]) for e in read.evaluations()] == [(8, 0.1), (16, 0.7)]
    assert [one.number for one in read.rows] == [1, 2, 6, 10, 11]


def test_repeated_evaluation(log):
    """Of two evaluations of one step and split, without a row that says so, the later one counts."""
    written(log, row(8, 0.1), row(8, 0.2, "heldout_pairs"), row(8, 0.3))
    assert [e["answer_accuracy"] for e in TrainingLog.read(log).evaluations()] == [0.3, 0.2]


@pytest.mark.parametrize(
    ("tail", "noted"),
    [
        (b'{"phase": "train", "st', True),
        ('{"phase": "é'.encode()[:-1], True),  # cut inside a letter
        (b"12", True),
        (b"\0" * 100, False),
        (b"", False),
        (b"\n\n", False),
        (b'{"phase": "train", "step": 9}', False),  # whole but for the line's end
    ],
)
def test_torn_last_line(log, tail, noted, recwarn):
    """An interrupted write costs the last line alone, with a note that names the file and the line."""
    log.write_bytes(b'{"phase": "train", "step": 8}\n' + tail)
    read = TrainingLog.read(log)
    assert [one.step for one in read.rows] == ([8, 9] if tail.endswith(b"}") else [8])
    assert not recwarn, "a trainer may be writing the line just now"
    read.evaluations()
    notes = [str(warned.message) for warned in recwarn if warned.category is Note]
    assert notes == ([f"{log}: line 2, the last, is cut off and was ignored"] if noted else [])


@pytest.mark.parametrize("line", [b"{", b"12", b"\xff", b"[" * 100_000])
def test_damage_before_the_last_line(log, line):
    """A damaged line that others follow is refused with its number."""
    log.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl:2: expected a JSON object; found "):
        TrainingLog.read(log)


def test_byte_order_mark(log, small_run):
    """A byte-order mark and Windows line ends change nothing, in the log and in a run's config."""
    log.write_bytes(b'\xef\xbb\xbf{"phase": "train", "step": 8}\r\n')
    (only,) = TrainingLog.read(log).rows
    assert only.step == 8 and only.line == b'{"phase": "train", "step": 8}'
    config = small_run / "run_config.json"
    before = RunDir.open(small_run).config
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert RunDir.open(small_run).config == before


@pytest.mark.parametrize(
    ("rows", "planned", "complete"),
    [
        ([row(300, 0.5)], 300, True),
        ([resume(300)], 300, True),  # of an older version, or of another trainer
        ([resume(300, num_steps=400)], 400, False),
        ([resume(300, num_steps=400.0)], 400, False),
        ([resume(100, num_steps=400), resume(300, num_steps=300)], 300, True),
        ([resume(300, num_steps=200)], 300, True),
    ],
)
def test_planned_end(small_run, rows, planned, complete):
    """The planned end is the later of the config's and the latest resume's."""
    written(small_run / "metrics.jsonl", *rows)
    run = RunDir.open(small_run)
    assert (run.planned_steps, run.complete) == (planned, complete)


@pytest.mark.parametrize("path", ["C:\\runs\\a\\checkpoints\\best.pt", "/home/x/best.pt", "best.pt", "..\\best.pt"])
def test_best_checkpoint_of_another_machine(small_run, path):
    """The best checkpoint is found in the run, whatever system recorded its path."""
    (small_run / "best_checkpoint.json").write_text(json.dumps({"path": path, "step": 300}))
    assert RunDir.open(small_run).best_checkpoint() == (300, small_run / "checkpoints" / "best.pt")


def test_run_without_seed_and_thresholds(small_run):
    """A run whose trainer recorded no seed and no thresholds opens; there is nothing to show for them."""
    path = small_run / "run_config.json"
    document = json.loads(path.read_text())
    document["seed"] = None
    document["evaluation"]["birth_thresholds"] = {"q": 0.2}
    path.write_text(json.dumps(document))
    config = RunDir.open(small_run).config
    assert config.title == "small_run (no seed recorded)" and config.attributes == {"run_name": "small_run"}
    expected = {"answer_accuracy": None, "heldout_answer_accuracy": 0.5, "q": 0.2, "r": None, "w": None}
    assert config.evaluation.birth_thresholds.model_dump() == expected
    del document["seed"], document["evaluation"]["birth_thresholds"]
    path.write_text(json.dumps(document))
    assert RunDir.open(small_run).config.seed is None
