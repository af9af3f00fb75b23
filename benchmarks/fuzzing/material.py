"""Makes the sound files that get damaged: a small benchmark, and a run of it with every result that kvjax writes.

    python -m benchmarks.fuzzing.material FOLDER

Runs in a process of its own, since what starts JAX must not fork afterwards.
"""

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path
from typing import Any

from kvjax.artifacts.files import read_json, write_json
from kvjax.artifacts.layout import ComparisonLayout, RunLayout
from kvjax.artifacts.results import RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.commands.main import main
from kvjax.compare.aligned import SweptRun
from kvjax.compare.factors import ScreenedRun, Setting
from kvjax.config.files import find_config
from kvjax.pipeline.factor_screen import write_factor_comparison
from kvjax.task.benchmark import Benchmark
from kvjax.task.pairs import generate_pairs
from kvjax.task.probe_set import open_probe_set

BENCHMARK, RUN, CONFIGS, RANKING = "benchmark", "run", "configs", "ranking.json"
COMPARISON, FACTOR = "comparison", "factor"
STEPS, EVERY = 60, 10
# Something counts as formed in any run, so that there are windows to damage.
_FIND_WINDOWS = {"threshold": 0.01, "threshold_alone": 0.01, "corroboration": 1, "resamples": 50}
_RANGES = {
    "active_keys": {"min": 2, "max": 3},
    "overwrite_count": {"min": 6, "max": 6},
    "num_queries": {"min": 3, "max": 4},
    "query_lag": {"min": 1, "max": 2},
}


def make_material(root: Path) -> None:
    """Makes the benchmark, the run, its results and the configs in a folder, by the commands that people use."""
    configs = root / CONFIGS
    configs.mkdir(parents=True, exist_ok=True)
    write_json(configs / "benchmark.json", benchmark_config())
    write_json(configs / "train.json", train_config())
    write_json(configs / "windows.json", read_json(find_config("default", "windows")) | _FIND_WINDOWS)
    benchmark, run = root / BENCHMARK, root / RUN
    _call("generate-benchmark", f"--config={configs / 'benchmark.json'}", f"--output_dir={benchmark}")
    _call("train", f"--config={configs / 'train.json'}", f"--benchmark_dir={benchmark}", f"--output_dir={run}")
    # As a run that was moved with its benchmark records it: found from the run's own folder.
    write_json(run / "run_config.json", read_json(run / "run_config.json") | {"benchmark_dir": BENCHMARK})
    _call("checkpoint-sweep", f"--run_dirs={run}", "--ablations=zero", "--probe=none", "--noevent_drift")
    _call("birth-windows", f"--run_dirs={run}", f"--config={configs / 'windows.json'}")
    _call("evaluate", f"--run_dirs={run}")
    _call("select-reference", f"--run_dirs={run}", f"--output={root / RANKING}")
    opened = Benchmark.open(benchmark)
    generate_pairs(open_probe_set(RunLayout(run).probe_set, opened), opened, pairs_per_kind=4)  # fewer than by default
    _call("intervene", f"--run_dirs={run}", f"--steps={STEPS}", "--force", "--kinds=neurons", "--pairs_per_kind=2")
    other = shutil.copytree(run, root / "other")
    write_json(other / "run_config.json", read_json(run / "run_config.json") | {"run_name": "other", "seed": 6})
    _call("compare-seeds", f"--run_dirs={run},{other}", f"--output_dir={root / COMPARISON}", "--null_draws=20")
    _compare_factor(root / FACTOR, run, other)
    shutil.rmtree(other)


def _compare_factor(folder: Path, run: Path, other: Path) -> None:
    """Compares two runs as two settings of a factor; a screen would train both."""
    settings = []
    for path, overrides in ((run, {}), (other, {"optimization.learning_rate": 0.003})):
        swept = SweptRun(path.name, RunResults(RunDir.open(path)))
        screened = ScreenedRun(path.name, str(path), 5, None, swept, None, {})
        settings.append(Setting(path.name, overrides, [screened], None))
    write_factor_comparison(ComparisonLayout(folder, "factor"), "fuzzed", "rate", settings)


def _call(*arguments: str) -> None:
    if main([*arguments]):
        raise SystemExit(f"kvjax {' '.join(arguments)} failed")


def benchmark_config() -> dict[str, Any]:
    """Returns the config of a benchmark of a few short streams."""
    split = {"num_samples": 12, **_RANGES}
    return {
        "benchmark_type": "symbolic_kv_stream",
        "name": "fuzzed",
        "output_dir": "unused",
        "seed": 3,
        "num_keys": 4,
        "num_values": 48,
        "holdout_answer_pair_fraction": 0.3,
        "heuristic_max_accuracy": 0.6,
        **{name: copy.deepcopy(split) for name in ("train", "validation_iid", "test_iid", "heldout_pairs")},
        "structural_ood": split | {"overwrite_count": {"min": 7, "max": 8}},
        "counterfactual": {"num_samples": 8, "source_split": "test_iid"},
    }


def train_config() -> dict[str, Any]:
    """Returns the config of a run of a tiny model."""
    return {
        "run_name": "fuzzed",
        "seed": 5,
        "benchmark_dir": BENCHMARK,
        "output_dir": "unused",
        "batch_size": 8,
        "num_steps": STEPS,
        "log_every_steps": 10,
        "eval_every_steps": EVERY,
        "checkpoint_every_steps": EVERY,
        "model": {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 24, "max_seq_len": 64},
        "optimization": {
            "learning_rate": 0.003,
            "weight_decay": 0.01,
            "beta1": 0.9,
            "beta2": 0.98,
            "grad_clip_norm": 1.0,
            "warmup_steps": 10,
            "schedule": {
                "kind": "cosine_decay",
                "decay_start_step": 20,
                "decay_end_step": 60,
                "min_learning_rate": 1e-4,
            },
        },
        "evaluation": {
            "batch_size": 8,
            "tracked_splits": ["validation_iid", "heldout_pairs"],
            "birth_thresholds": {"answer_accuracy": 0.05, "q": 0.2, "r": 0.3, "w": -1.0},
        },
        "checkpointing": {"best_checkpoint_split": "validation_iid"},
    }


if __name__ == "__main__":
    make_material(Path(sys.argv[1]))
