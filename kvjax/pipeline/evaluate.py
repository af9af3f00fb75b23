"""The stage that evaluates one checkpoint of each run on full splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kvjax.artifacts.files import file_sha256, read_json, write_json
from kvjax.artifacts.identity import check_seal, sealed
from kvjax.artifacts.provenance import software_versions
from kvjax.artifacts.run_dir import RunDir
from kvjax.converters.convert import convert_checkpoint
from kvjax.devices import device_description
from kvjax.errors import InputError, bad_argument, command
from kvjax.model.decoder_config import DecoderConfig
from kvjax.pipeline.current import Current
from kvjax.pipeline.progress import Progress, no_progress
from kvjax.pipeline.settings import DEFAULT_RESULTS, EvaluateSettings, ResultSettings, RunsOnBenchmark
from kvjax.pipeline.written_runs import open_to_write
from kvjax.sweeps.evaluation import SplitEvaluation, SplitEvaluator
from kvjax.task.benchmark import Benchmark


@dataclasses.dataclass(frozen=True)
class EvaluatedCheckpoint:
    """One checkpoint of a run on full splits."""

    run: RunDir
    benchmark: Benchmark
    path: Path
    sha256: str
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
            benchmark=benchmark,
            path=path,
            sha256=converted.sha256,
            step=step,
            parameter_count=sum(np.size(leaf) for leaf in jax.tree.leaves(converted.params)),
            notes=converted.notes,
            splits={split: evaluator.evaluate(converted.params, split) for split in splits},
        )


def evaluate(
    runs: RunsOnBenchmark,
    settings: EvaluateSettings,
    progress: Progress = no_progress,
    results: ResultSettings = DEFAULT_RESULTS,
) -> list[tuple[EvaluatedCheckpoint, Path]]:
    """Evaluates a checkpoint of each run, and writes `analysis/evaluation/<checkpoint>.json` beside it.

    Other splits that an earlier call evaluated, of the same checkpoint file and benchmark, stay in that file.

    Returns:
      What was measured, with the file that holds it, run by run.

    Raises:
      InputError: a run, its benchmark, a split or a checkpoint cannot be used.
    """
    evaluator, evaluated = CheckpointEvaluator(), []
    with open_to_write(runs, results, needs="checkpoints") as found, progress(len(found), "runs") as advance:
        for run in found:
            benchmark = Benchmark.open(run.benchmark_dir(runs.benchmark_dir))
            result = evaluator.evaluate(run, benchmark, settings.checkpoint, settings.splits or _all_splits(benchmark))
            path = run.layout.evaluation(settings.checkpoint)
            write_json(path, sealed(_document(result, _earlier_splits(path, result))))
            evaluated.append((result, path))
            advance(1)
    return evaluated


def evaluation_is_current(run: RunDir, checkpoint: str = "best") -> Current:
    """Says whether a checkpoint is evaluated on all splits but train, as its file and the benchmark are now."""
    rerun, path = command("evaluate", run_dirs=[run.path], checkpoint=checkpoint), run.layout.evaluation(checkpoint)
    if not path.is_file():
        return Current(False, f"{path} does not exist", rerun)
    try:
        document, benchmark = read_json(path), Benchmark.open(run.benchmark_dir())
        check_seal(document, path, rerun)
        measured, measured_on = document.get("checkpoint_sha256"), document["benchmark"]["sha256"]
        missing = [split for split in _all_splits(benchmark) if split not in document["splits"]]
        sha256 = file_sha256(run.checkpoint_named(checkpoint)[1])
    except InputError as error:
        return Current(False, str(error), rerun)
    except (KeyError, TypeError, AttributeError):
        return Current(False, f"{path} is no evaluation", rerun)
    if measured != sha256:
        return Current(False, f"the checkpoint {checkpoint} is another file than the evaluated one", rerun)
    if not benchmark.hashes.names(measured_on):
        return Current(False, f"{path} was measured on another benchmark than the one in {benchmark.path}", rerun)
    if missing:
        return Current(False, f"{path} lacks {', '.join(missing)}", rerun)
    return Current(True, f"{path} holds the evaluation of this checkpoint")


def _all_splits(benchmark: Benchmark) -> list[str]:
    return [split for split in benchmark.split_sizes if split != "train"]


def _earlier_splits(path: Path, result: EvaluatedCheckpoint) -> dict[str, Any]:
    """Reads what an earlier call evaluated on other splits, if of the same checkpoint file and benchmark."""
    try:
        document = read_json(path)
        check_seal(document, path, "evaluated again")
        same = (document["checkpoint_sha256"], document["benchmark"]["sha256"]) == (
            result.sha256,
            result.benchmark.sha256,
        )
        return dict(document["splits"]) if same else {}
    except (InputError, KeyError, TypeError, ValueError, AttributeError):
        return {}  # there is none, or it is damaged


def _document(result: EvaluatedCheckpoint, earlier: Mapping[str, Any]) -> dict[str, object]:
    splits = {**earlier, **{split: evaluation.to_row() for split, evaluation in result.splits.items()}}
    return {
        "run_name": result.run.config.run_name,
        "checkpoint": result.path.name,
        "checkpoint_sha256": result.sha256,
        "step": result.step,
        "benchmark": {"name": result.benchmark.name, "sha256": result.benchmark.sha256},
        "splits": {split: splits[split] for split in result.benchmark.split_sizes if split in splits},
        "notes": list(result.notes),
        "device": device_description(),
        "versions": software_versions(),
    }
