"""Checkpoints of runs evaluated on full splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from kvjax.converters.convert import convert_checkpoint

from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import bad_argument
from kvjax.model.decoder import DecoderConfig
from kvjax.sweeps.evaluation import SplitEvaluation, SplitEvaluator
from kvjax.task.benchmark import Benchmark


@dataclasses.dataclass(frozen=True)
class EvaluatedCheckpoint:
    """One checkpoint of a run on full splits."""

    run: RunDir
    path: Path
    step: int
    parameter_count: int
    splits: dict[str, SplitEvaluation]
    notes: tuple[str, ...]


class CheckpointEvaluator:
    """Evaluates checkpoints of several runs; runs of one benchmark and shape share data and programs."""

    def __init__(self) -> None:
        self._evaluators: dict[tuple[Path, DecoderConfig], SplitEvaluator] = {}

    def evaluate(
        self, run: RunDir, benchmark: Benchmark, checkpoint: str, splits: Sequence[str]
    ) -> EvaluatedCheckpoint:
        """Evaluates the checkpoint that `best`, `final` or a step names.

        Raises:
          InputError: there is no such checkpoint or split, or the file cannot be used.
        """
        missing = [split for split in splits if split not in benchmark.split_sizes]
        if missing:
            raise bad_argument("splits", f"splits of {benchmark.path} ({', '.join(benchmark.split_sizes)})", missing[0])
        step, path = run.checkpoint_named(checkpoint)
        converted = convert_checkpoint(path, run.config, benchmark, expected_step=step)
        config = DecoderConfig.from_model_config(run.config.model, len(benchmark.vocabulary.tokens))
        key = (benchmark.path.resolve(), config)
        evaluator = self._evaluators.setdefault(key, SplitEvaluator(config, benchmark))
        return EvaluatedCheckpoint(
            run=run,
            path=path,
            step=step,
            parameter_count=sum(np.size(leaf) for leaf in jax.tree.leaves(converted.params)),
            notes=converted.notes,
            splits={split: evaluator.evaluate(converted.params, split) for split in splits},
        )
