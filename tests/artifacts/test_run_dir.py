"""Run directories: whether a run is finished."""

import json

import pytest

from kvjax.artifacts.run_dir import RunDir


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
