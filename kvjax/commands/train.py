"""Train a decoder on a benchmark; several seeds train as one program, one run directory each.

Each run directory holds run_config.json, metrics.jsonl, checkpoints/ with PyTorch files, best_checkpoint.json and
summary.json: what every other command reads.
"""

from __future__ import annotations

from kvjax.commands.runtime import engine_of, progress_of, start_jax
from kvjax.pipeline.settings import Display, Runtime, TrainSettings, WorkplaceSettings

SETTINGS = (TrainSettings, WorkplaceSettings, Display, Runtime)


def run(settings: TrainSettings, workplace: WorkplaceSettings, display: Display, runtime: Runtime) -> None:
    from kvjax.pipeline.text import print_trained
    from kvjax.pipeline.train_seeds import train

    start_jax(runtime)
    print_trained(train(settings, progress_of(display), engine_of(workplace, runtime)))
