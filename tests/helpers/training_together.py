"""Trains runs of other settings alone and beside each other, in a process that compiles as it does for people.

    python -m tests.helpers.training_together BENCHMARK OUTPUT.json

The output maps the members of each program to how devices share it and what each of its runs ended with.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from kvjax.config.train import TrainConfig
from kvjax.devices import use_compilation_cache
from kvjax.task.benchmark import Benchmark
from kvjax.train.loop import Training
from kvjax.train.trainer import train_segment
from tests.helpers.building import SMALL_MODEL
from tests.helpers.training import Kept, small_train_config

STAGE = {"until_step": 6, "active_keys": {"min": 2, "max": 2}}
COSINE = {"kind": "cosine_decay", "min_learning_rate": 1e-4}
PROGRAMS = ((0,), (3,), (0, 1, 2, 3), (3, 1, 0))


def runs_that_differ(benchmark: Path) -> list[TrainConfig]:
    """Returns runs that differ in all that may differ within a program."""
    plain = small_train_config(benchmark).optimization.model_dump()
    changes = (
        {},
        {"seed": 4, "optimization": plain | {"learning_rate": 1e-3, "weight_decay": 0.3, "warmup_steps": 0}},
        {"model": SMALL_MODEL | {"init_scale": 0.5}, "optimization": plain | {"beta1": 0.8, "beta2": 0.99}},
        {"curriculum": [STAGE], "optimization": plain | {"schedule": COSINE, "grad_clip_norm": None}},
    )
    return [small_train_config(benchmark, num_steps=12, **one) for one in changes]


def train_together(benchmark: Path, configs: Sequence[TrainConfig]) -> dict[str, object]:
    """Trains runs as one program; returns how it was planned and each run's rows and a digest of its state."""
    kept = [Kept() for _ in configs]
    training = Training(configs, Benchmark.open(benchmark))
    train_segment.clear_cache()
    training.run(training.initial_states(), kept, advance=lambda steps: None)
    digests = [hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in one.saved[12])).hexdigest() for one in kept]
    return {
        "devices": training.program.devices,
        "shared": training.program.shared,
        "programs": train_segment._cache_size(),
        "rows": [one.rows for one in kept],
        "digests": digests,
    }


def main(benchmark: str, output: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    use_compilation_cache()
    configs = runs_that_differ(Path(benchmark))
    found = {str(list(m)): train_together(Path(benchmark), [configs[one] for one in m]) for m in PROGRAMS}
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
