"""Run directories: whether a run is finished, and which of its checkpoints is the best."""

import json

import pytest

from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import InputError


@pytest.mark.parametrize(
    ("num_steps", "last", "summary", "complete"),
    [
        (300, 300, False, True),
        (300, 200, False, False),
        (300, 200, True, False),
        (350, 300, False, False),  # a trainer may save its last step whatever its number, as this project's does
        (350, 350, False, True),
        (350, 300, True, True),  # and another may not
        (350, 200, True, False),
        (50, None, True, False),
    ],
)
def test_finished_run(small_run, num_steps, last, summary, complete):
    """A run is finished once the checkpoint of its last step is there."""
    config = small_run / "run_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_steps": num_steps}))
    folder = small_run / "checkpoints"
    if last == 350:
        (folder / "step_000350.pt").write_bytes((folder / "step_000300.pt").read_bytes())
    for path in folder.glob("step_*.pt"):
        if last is None or int(path.stem[5:]) > last:
            path.unlink()
    if summary:
        (small_run / "summary.json").write_text("{}")
    assert RunDir.open(small_run).complete == complete


@pytest.mark.parametrize(
    "record",
    [
        {"path": "y" * 3000, "step": 300},
        {"path": "\0", "step": 300},
        {"path": "best.pt", "step": "300"},
        {"path": "best.pt", "step": 300.5},
        {"path": "best.pt", "step": None},
        ["best.pt", 300],
    ],
)
def test_unusable_record_of_the_best(small_run, record):
    """A record that names no possible file, or no whole step, is refused in a printable line that names it."""
    (small_run / "best_checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"best_checkpoint\.json: expected") as refusal:
        RunDir.open(small_run).best_checkpoint()
    assert str(refusal.value).isprintable()


def test_benchmark_named_too_long(small_run):
    """A benchmark's path that no system can have is refused like any other that does not exist."""
    document = json.loads((small_run / "run_config.json").read_text()) | {"benchmark_dir": "y" * 3000}
    (small_run / "run_config.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"run_config\.json: expected benchmark_dir to exist"):
        RunDir.open(small_run).benchmark_dir()
