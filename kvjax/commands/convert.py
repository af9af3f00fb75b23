"""Convert a run's PyTorch checkpoints to Flax parameters (--to=flax), or the stored parameters back (--to=torch).

To flax: one Orbax store per run in analysis/converted, with a parity certificate per checkpoint. To torch: .pt files
in analysis/exported_torch that hold exactly the stored parameters.
"""

from __future__ import annotations

from absl import flags

from kvjax.commands import common

FLAGS = flags.FlagValues()
common.define_runtime_flags(FLAGS)
common.define_run_flags(FLAGS)
flags.DEFINE_enum("to", "flax", ["flax", "torch"], "What to convert to.", flag_values=FLAGS)
flags.DEFINE_enum(
    "verify",
    "sample",
    ["sample", "all", "metrics", "none"],
    "How to check: parity with PyTorch on 16 sequences, on the whole validation split, also the accuracies the run "
    "recorded in metrics.jsonl, or not at all. To torch, anything but none reads every file back.",
    flag_values=FLAGS,
)


def run() -> None:
    from kvjax.artifacts.run_dir import find_run_dirs
    from kvjax.converters.convert_run import convert_run, export_run
    from kvjax.task.benchmark import Benchmark

    common.start_jax(FLAGS)
    runs = find_run_dirs(common.required(FLAGS, "run_dirs"))
    total = sum(len(run_dir.checkpoints) for run_dir in runs)
    reports = []
    with common.progress_bar(total, "checkpoints", show=FLAGS.progress) as advance:
        for run_dir in runs:
            if FLAGS.to == "torch":
                reports.append(export_run(run_dir, verify=FLAGS.verify, advance=advance))
            else:
                benchmark = Benchmark.open(run_dir.benchmark_dir(FLAGS.benchmark_dir))
                reports.append(convert_run(run_dir, benchmark, verify=FLAGS.verify, advance=advance))
    for report in reports:
        print(f"{len(report.steps)} checkpoints, steps {report.steps[0]} to {report.steps[-1]}, in {report.folder}")
        if report.largest_difference is not None:
            print(
                f"  parity with PyTorch: logits within {report.largest_difference:.1e} of the largest, "
                f"{report.near_ties} near-ties"
            )
        for check in report.metric_checks:
            print(
                f"  step {check.step} {check.split}: recorded {check.recorded:.6f}, measured {check.measured:.6f} "
                f"({check.num_events} reads)"
            )
    runs_flag = ",".join(str(run_dir.path) for run_dir in runs)
    benchmark_flag = f" --benchmark_dir={FLAGS.benchmark_dir}" if FLAGS.benchmark_dir else ""
    print(
        f"Next: kvjax checkpoint-sweep --run_dirs={runs_flag}{benchmark_flag}"
        if FLAGS.to == "flax"
        else "Next: torch.load any of them."
    )
