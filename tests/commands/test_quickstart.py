"""The quickstart's whole way, on settings small enough for a test, and what running it again does."""

import json

from kvjax.commands.main import main
from tests.helpers.building import read_lines, small_benchmark_config
from tests.helpers.training import small_train_config


def test_quickstart(tmp_path, capsys):
    """The quickstart makes everything, then reuses it, resumes it, and refuses another config."""
    benchmark, training = tmp_path / "benchmark.json", tmp_path / "train.json"
    benchmark.write_text(json.dumps(small_benchmark_config()))
    training.write_text(json.dumps(small_train_config("replaced").model_dump(mode="json")))
    output = tmp_path / "out"
    arguments = [
        "quickstart",
        f"--output_dir={output}",
        f"--benchmark_config={benchmark}",
        f"--train_config={training}",
        "--seeds=3,4",
        "--noprogress",
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for seed in (3, 4):
        rows = read_lines(output / "runs" / f"seed_{seed}" / "analysis" / "checkpoint_metrics.jsonl")
        assert [row["step"] for row in rows] == [8, 16, 24]
        assert f"trained_seed_{seed} (seed {seed})" in printed
    figures = {path.name for path in (output / "figures").iterdir()}
    assert (output / "report.html").is_file() and f"Open {output / 'report.html'} in a browser." in printed
    assert figures == {"trajectories.png", "trajectories.svg", "head_ablations.png", "head_ablations.svg"}

    checkpoint = output / "runs" / "seed_3" / "checkpoints" / "step_000024.pt"
    before = checkpoint.stat().st_mtime_ns
    assert main(arguments) == 0
    assert "0 measured, 3 reused" in capsys.readouterr().out
    assert checkpoint.stat().st_mtime_ns == before

    # Interrupted after step 8: it goes on from there.
    for seed in (3, 4):
        run = output / "runs" / f"seed_{seed}"
        for name in (
            "summary.json",
            "checkpoints/step_000016.pt",
            "checkpoints/step_000024.pt",
            "best_checkpoint.json",
        ):
            (run / name).unlink()
    assert main(arguments) == 0
    rows = read_lines(output / "runs" / "seed_3" / "metrics.jsonl")
    assert {"phase": "resume", "step": 8, "num_steps": 24} in rows and checkpoint.exists()

    # Another config in the same place is refused.
    training.write_text(json.dumps(small_train_config("replaced", batch_size=16).model_dump(mode="json")))
    assert main(arguments) == 2
    assert "a run of another config" in capsys.readouterr().err
