"""Rank runs by their best checkpoint and select the reference.

Held-out pairs decide first, then validation, structural OOD, test and counterfactual accuracy, then fewer parameters;
runs below the minimum validation accuracy are listed, but not eligible. The reasons are written out.
"""

from __future__ import annotations

from absl import flags

from kvjax.commands import common

FLAGS = flags.FlagValues()
common.define_runtime_flags(FLAGS)
common.define_run_flags(FLAGS)
flags.DEFINE_float(
    "min_validation_answer_accuracy",
    0.9,
    "Validation answer accuracy a run needs to be eligible.",
    lower_bound=0.0,
    upper_bound=1.0,
    flag_values=FLAGS,
)
flags.DEFINE_string("output", None, "JSON file for the ranking; by default it is only printed.", flag_values=FLAGS)


def run() -> None:
    from pathlib import Path

    from kvjax.artifacts.files import write_json
    from kvjax.artifacts.run_dir import find_run_dirs
    from kvjax.compare.reference import RANKED_SPLITS, Candidate, select_reference
    from kvjax.converters.evaluation import CheckpointEvaluator
    from kvjax.errors import unusable
    from kvjax.task.benchmark import Benchmark

    common.start_jax(FLAGS)
    runs = find_run_dirs(common.required(FLAGS, "run_dirs"))
    evaluator, candidates, benchmarks = CheckpointEvaluator(), [], set()
    with common.progress_bar(len(runs), "runs", show=FLAGS.progress) as advance:
        for run_dir in runs:
            benchmark = Benchmark.open(run_dir.benchmark_dir(FLAGS.benchmark_dir))
            benchmarks.add(benchmark.sha256)
            if len(benchmarks) > 1:
                raise unusable(run_dir.path, "runs of one benchmark (or --benchmark_dir)", f"another, {benchmark.path}")
            result = evaluator.evaluate(run_dir, benchmark, "best", RANKED_SPLITS)
            accuracies = {split: evaluation.answer_accuracy for split, evaluation in result.splits.items()}
            candidates.append(Candidate(str(run_dir.path), result.step, accuracies, result.parameter_count))
            advance(1)
    ranking = select_reference(candidates, min_validation_answer_accuracy=FLAGS.min_validation_answer_accuracy)
    for row in ranking["candidates"]:
        accuracies = "  ".join(f"{split} {accuracy:.3f}" for split, accuracy in row["accuracies"].items())
        print(f"{row['rank'] or '-':>3}  {row['run_dir']} (step {row['step']}): {accuracies}\n     {row['reason']}")
    print(f"Selected: {ranking['selected'] or 'none'} ({ranking['reason']})")
    if FLAGS.output:
        write_json(Path(FLAGS.output), ranking)
        print(f"Ranking in {FLAGS.output}")
