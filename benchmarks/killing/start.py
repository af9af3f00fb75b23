"""Makes the folders that commands to be killed start from: configs and a benchmark, or what another command leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.fuzzing.material import benchmark_config, train_config
from benchmarks.killing.children import Counter, run_command
from benchmarks.killing.victims import BENCHMARK, VICTIMS

_FEW_CHECKPOINTS = {"num_steps": 40, "eval_every_steps": 10, "checkpoint_every_steps": 10}


def make_start(scratch: Path) -> Path:
    """Makes the configs and a benchmark; returns their folder.

    Raises:
      RuntimeError: the benchmark cannot be drawn.
    """
    configs = scratch / "configs"
    configs.mkdir()
    train = train_config() | {"benchmark_dir": str(configs / BENCHMARK)}
    documents = {"benchmark": benchmark_config(), "train": train, "study": train | _FEW_CHECKPOINTS}
    for name, document in (documents | {"screen": _screen(configs)}).items():
        (configs / f"{name}.json").write_text(json.dumps(document))
    drawing = ["generate-benchmark", f"--config={configs / 'benchmark.json'}", f"--output_dir={configs / BENCHMARK}"]
    if run_command(drawing, scratch / "drawing", Counter()).status:
        raise RuntimeError((scratch / "drawing.log").read_text())
    return configs


def _screen(configs: Path) -> dict[str, Any]:
    heads = {"name": "heads", "base_label": "many", "values": [{"label": "one", "train": {"model.n_heads": 1}}]}
    return {
        "name": "tiny",
        "train_config": str(configs / "study.json"),
        "benchmark_config": str(configs / "benchmark.json"),
        "seeds": [3],
        "output_dir": "unused",
        "factors": [heads],
    }


def starts(configs: Path, made_by: Callable[[str, Path], Path]) -> Callable[[str], Path]:
    """Returns a function that gives the folder a command starts from.

    Args:
      configs: the folder of `make_start`.
      made_by: runs a command of a name from a folder, and returns the folder with its result.
    """
    made: dict[str, Path] = {}

    def folder_for(command: str) -> Path:
        needs = VICTIMS[command].needs
        if needs is None:
            return configs
        if needs not in made:
            made[needs] = made_by(needs, folder_for(needs))
        return made[needs]

    return folder_for
