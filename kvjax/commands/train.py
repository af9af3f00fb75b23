"""Train a decoder on a benchmark; several seeds train as one program, one run directory each.

Each run directory holds run_config.json, metrics.jsonl, checkpoints/ with PyTorch files, best_checkpoint.json and
summary.json: what every other command reads.
"""

from __future__ import annotations

from absl import flags

from kvjax.commands import common

FLAGS = flags.FlagValues()
common.define_runtime_flags(FLAGS)
flags.DEFINE_string("config", None, "Training config: a JSON file, or the name of a shipped one.", flag_values=FLAGS)
flags.DEFINE_list(
    "seeds", None, "Seeds, such as 7,11,13; by default the config's own, in output_dir itself.", flag_values=FLAGS
)
flags.DEFINE_string("benchmark_dir", None, "The benchmark; by default the config's.", flag_values=FLAGS)
flags.DEFINE_string("output_dir", None, "Where runs go; by default the config's output_dir.", flag_values=FLAGS)
flags.DEFINE_bool("resume", False, "Go on from the latest checkpoint that every run has.", flag_values=FLAGS)
flags.DEFINE_bool("overwrite", False, "Replace existing run directories.", flag_values=FLAGS)
flags.DEFINE_bool("progress", True, "Show a progress bar with the time left.", flag_values=FLAGS)


def run() -> None:
    from pathlib import Path

    from kvjax.config.files import find_config, read_config
    from kvjax.config.train import TrainConfig
    from kvjax.converters.training import run_directories, train_runs
    from kvjax.task.benchmark import Benchmark

    common.start_jax(FLAGS)
    config = read_config(find_config(common.required(FLAGS, "config"), "train"), TrainConfig)
    if FLAGS.benchmark_dir:
        config = config.model_copy(update={"benchmark_dir": FLAGS.benchmark_dir})
    runs = run_directories(config, common.integers("seeds", FLAGS.seeds), FLAGS.output_dir)
    benchmark = Benchmark.open(Path(config.benchmark_dir))
    with common.progress_bar(config.num_steps, "steps", show=FLAGS.progress) as advance:
        trained = train_runs(runs, benchmark, resume=FLAGS.resume, overwrite=FLAGS.overwrite, advance=advance)
    for run_dir in trained:
        accuracies = "  ".join(f"{s} {row['answer_accuracy']:.3f}" for s, row in run_dir.evaluations.items())
        print(f"seed {run_dir.seed}: {accuracies}  in {run_dir.path}")
    print(f"Next: kvjax checkpoint-sweep --run_dirs={','.join(str(run_dir.path) for run_dir in trained)}")
