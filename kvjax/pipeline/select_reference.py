"""The stage that selects the reference run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvjax.artifacts.files import file_sha256, read_json, write_json
from kvjax.artifacts.find_runs import find_run_dirs
from kvjax.artifacts.run_dir import RunDir
from kvjax.compare.reference import RANKED_SPLITS, Candidate, select_reference
from kvjax.errors import InputError, unusable
from kvjax.pipeline.current import Current
from kvjax.pipeline.evaluate import CheckpointEvaluator
from kvjax.pipeline.over_runs import over_runs
from kvjax.pipeline.progress import Progress, no_progress
from kvjax.pipeline.settings import RunsOnBenchmark, SelectSettings
from kvjax.task.benchmark import Benchmark
from kvjax.units.unit import IN_PROCESS, Engine


def rank_runs(
    runs: RunsOnBenchmark, settings: SelectSettings, progress: Progress = no_progress, engine: Engine = IN_PROCESS
) -> dict[str, Any]:
    """Evaluates the best checkpoint of each run, ranks the runs and selects the reference.

    Returns:
      The ranking (see `kvjax.compare.reference`), which is written to `settings.output` as well if that is given.

    Raises:
      InputError: a run, its benchmark or its best checkpoint cannot be used, or the runs are of several benchmarks.
    """
    benchmark = _common_benchmark(find_run_dirs(runs.run_dirs, needs="checkpoints"), runs.benchmark_dir)
    candidates = over_runs(
        "evaluation", evaluate_candidates, runs, needs="checkpoints", progress=progress, engine=engine
    )
    floor = settings.min_validation_answer_accuracy
    ranking = select_reference(candidates, min_validation_answer_accuracy=floor)
    ranking["benchmark"] = {"name": benchmark.name, "sha256": benchmark.sha256}
    if settings.output:
        write_json(Path(settings.output), ranking)
    return ranking


def evaluate_candidates(runs: RunsOnBenchmark, progress: Progress = no_progress) -> list[Candidate]:
    """Evaluates the best checkpoint of each run on the splits that rank it.

    Raises:
      InputError: a run, its benchmark or its best checkpoint cannot be used.
    """
    found, evaluator, candidates = find_run_dirs(runs.run_dirs, needs="checkpoints"), CheckpointEvaluator(), []
    with progress(len(found), "runs") as advance:
        for run in found:
            benchmark = Benchmark.open(run.benchmark_dir(runs.benchmark_dir))
            result = evaluator.evaluate(run, benchmark, "best", RANKED_SPLITS)
            accuracies = {split: evaluation.answer_accuracy for split, evaluation in result.splits.items()}
            candidates.append(Candidate(str(run.path), result.step, result.sha256, accuracies, result.parameter_count))
            advance(1)
    return candidates


def _common_benchmark(found: Sequence[RunDir], override: str | None) -> Benchmark:
    """Opens the benchmark of runs, and refuses those of several."""
    opened: dict[Path, Benchmark] = {}
    for run in found:
        path = run.benchmark_dir(override)
        benchmark = opened[path] = opened.get(path) or Benchmark.open(path)
        first = next(iter(opened.values()))
        if benchmark.sha256 != first.sha256:
            expected = f"a run of the benchmark in {first.path}, as the others (or `benchmark_dir`)"
            raise unusable(run.path, expected, f"one of {benchmark.path}")
    return first


def ranking_is_current(runs: list[RunDir], output: Path) -> Current:
    """Says whether a file ranks exactly these runs, by the best checkpoints that they have now."""
    if not output.is_file():
        return Current(False, f"{output} does not exist")
    try:
        ranking = read_json(output)
        ranked = {row["run_dir"]: (row["step"], row["checkpoint_sha256"]) for row in ranking["candidates"]}
        measured_on = ranking["benchmark"]["sha256"]
        best = {str(run.path): (step, file_sha256(path)) for run in runs for step, path in [run.best_checkpoint()]}
        benchmarks = {run.path: Benchmark.open(run.benchmark_dir()).hashes for run in runs}
    except InputError as error:
        return Current(False, str(error))
    except (KeyError, TypeError):
        return Current(False, f"{output} is no ranking")
    if ranked.keys() != best.keys():
        return Current(False, f"{output} ranks {len(ranked)} runs, and not the {len(best)} that there are")
    for path, found in best.items():
        if ranked[path] != found:
            reason = f"the best checkpoint of {path}, of step {found[0]}, is another than the ranked one"
            return Current(False, f"{reason}, of step {ranked[path][0]}")
    for path, hashes in benchmarks.items():
        if not hashes.names(measured_on):
            return Current(False, f"{output} was measured on another benchmark than that of {path}")
    return Current(True, f"{output} ranks these runs")
