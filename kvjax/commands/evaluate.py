"""Evaluate one checkpoint of each run on full splits of the benchmark.

Prints answer accuracy per split and writes everything to analysis/evaluation/<checkpoint>.json beside each run.
"""

from __future__ import annotations

from absl import flags

from kvjax.commands import common

FLAGS = flags.FlagValues()
common.define_runtime_flags(FLAGS)
common.define_run_flags(FLAGS)
flags.DEFINE_string("checkpoint", "best", "Which checkpoint: best, final or a step.", flag_values=FLAGS)
flags.DEFINE_list("splits", None, "Splits to evaluate on; by default all but train.", flag_values=FLAGS)


def run() -> None:
    from kvjax.artifacts.files import write_json
    from kvjax.artifacts.provenance import software_versions
    from kvjax.artifacts.run_dir import find_run_dirs
    from kvjax.converters.evaluation import CheckpointEvaluator
    from kvjax.task.benchmark import Benchmark

    common.start_jax(FLAGS)
    runs = find_run_dirs(common.required(FLAGS, "run_dirs"))
    evaluator, evaluated = CheckpointEvaluator(), []
    with common.progress_bar(len(runs), "runs", show=FLAGS.progress) as advance:
        for run_dir in runs:
            benchmark = Benchmark.open(run_dir.benchmark_dir(FLAGS.benchmark_dir))
            splits = FLAGS.splits or [split for split in benchmark.split_sizes if split != "train"]
            result = evaluator.evaluate(run_dir, benchmark, FLAGS.checkpoint, splits)
            document = {
                "run_name": run_dir.config.run_name,
                "checkpoint": result.path.name,
                "step": result.step,
                "benchmark": {"name": benchmark.name, "sha256": benchmark.sha256},
                "splits": {split: evaluation.to_row() for split, evaluation in result.splits.items()},
                "notes": list(result.notes),
                "versions": software_versions(),
            }
            path = run_dir.layout.evaluation(FLAGS.checkpoint)
            write_json(path, document)
            evaluated.append((result, path))
            advance(1)
    for result, path in evaluated:
        print(f"{result.run.path}, step {result.step} ({result.path.name})")
        for split, evaluation in result.splits.items():
            print(
                f"  {split:<16} answer accuracy {evaluation.answer_accuracy:.4f}  "
                f"margin {evaluation.answer_margin:7.2f}  loss {evaluation.loss:.3f}  {evaluation.total} reads"
            )
        for note in result.notes:
            print(f"  note: {note}")
        print(f"  in {path}")
