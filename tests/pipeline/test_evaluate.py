"""The evaluation file: splits that an earlier call evaluated stay in it, as long as they are of the same files."""

import json
import shutil

import pytest

from kvjax.pipeline.evaluate import CheckpointEvaluator, EvaluatedCheckpoint, evaluate
from kvjax.pipeline.settings import EvaluateSettings, RunsOnBenchmark
from kvjax.sweeps.evaluation import SplitEvaluation

CHECKPOINT = "a" * 64


@pytest.fixture
def benchmark(small_benchmark, tmp_path):
    return shutil.copytree(small_benchmark, tmp_path / "benchmark")


@pytest.fixture
def evaluated(small_run, benchmark, monkeypatch):
    """Makes a stand-in for evaluation: it computes nothing and reports the given number of right answers."""

    def run_command(right, sha256=CHECKPOINT, **splits):
        def result(self, run, opened, checkpoint, names):
            path = run.checkpoint_named(checkpoint)[1]
            rows = {name: SplitEvaluation(right, 10, 0.0, 1.0, 0.5, {}, {}, {}, {}) for name in names}
            return EvaluatedCheckpoint(run, opened, path, sha256, 300, 1, rows, ())

        monkeypatch.setattr(CheckpointEvaluator, "evaluate", result)
        runs = RunsOnBenchmark(run_dirs=(str(small_run),), benchmark_dir=str(benchmark))
        ((_, path),) = evaluate(runs, EvaluateSettings(**splits))
        document = json.loads(path.read_text())
        return {split: row["answer_accuracy"] for split, row in document["splits"].items()}

    return run_command


def test_splits_of_an_earlier_call(evaluated):
    """Evaluating one split replaces its row and keeps the others, in the benchmark's order."""
    everything = dict.fromkeys(("validation_iid", "test_iid", "heldout_pairs", "structural_ood", "counterfactual"), 0.3)
    assert evaluated(3) == everything
    found = evaluated(7, splits="test_iid")
    assert found == everything | {"test_iid": 0.7} and list(found) == list(everything)
    assert evaluated(2, splits="counterfactual,validation_iid") == found | {
        "counterfactual": 0.2,
        "validation_iid": 0.2,
    }


def test_splits_of_other_files(evaluated, benchmark, small_run):
    """Rows of another checkpoint file or another benchmark, and a damaged file, give way."""
    evaluated(3)
    assert evaluated(7, sha256="b" * 64, splits="test_iid") == {"test_iid": 0.7}
    assert evaluated(4, sha256="b" * 64, splits="heldout_pairs") == {"test_iid": 0.7, "heldout_pairs": 0.4}
    metadata = benchmark / "metadata.json"
    metadata.write_text(metadata.read_text() + " ")
    assert evaluated(5, sha256="b" * 64, splits="counterfactual") == {"counterfactual": 0.5}
    (small_run / "analysis" / "evaluation" / "best.json").write_text('{"splits": 3')
    assert evaluated(6, sha256="b" * 64, splits="test_iid") == {"test_iid": 0.6}
