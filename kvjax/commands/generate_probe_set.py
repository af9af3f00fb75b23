"""Choose the fixed records that every checkpoint is measured on, and the fit set beside them.

A probe set is immutable: it is written once, hashed, and refused if edited or used with another benchmark.
"""

from __future__ import annotations

from absl import flags

from kvjax.commands import common

FLAGS = flags.FlagValues()
flags.DEFINE_string("benchmark_dir", None, "The benchmark to choose from.", flag_values=FLAGS)
flags.DEFINE_string(
    "output",
    None,
    "The probe set to write, ending in .jsonl; its companions go beside it.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("examples_per_split", 96, "Probe records per split.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "fit_examples", 512, "Records of the fit set, from the train split.", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_integer("seed", 17, "Seed of the choice.", flag_values=FLAGS)


def run() -> None:
    from pathlib import Path

    from kvjax.task.benchmark import Benchmark
    from kvjax.task.probe_set import generate_probe_set

    benchmark = Benchmark.open(Path(common.required(FLAGS, "benchmark_dir")))
    output = Path(common.required(FLAGS, "output"))
    probe = generate_probe_set(
        benchmark,
        output,
        examples_per_split=FLAGS.examples_per_split,
        fit_examples=FLAGS.fit_examples,
        seed=FLAGS.seed,
    )
    for split, count in probe.manifest.split_counts.items():
        reads = sum(probe.manifest.coverage[split]["active_keys"].values())
        added = probe.manifest.added_for_coverage[split]
        more = f"  ({added} beyond --examples_per_split, for coverage)" if added else ""
        print(f"{split:<16} {count:>4} records  {reads:>5} reads{more}")
    print(f"{probe.manifest.fit_split:<16} {probe.manifest.num_fit_records:>4} records to fit on")
    print(f"Probe set in {output}. Next: kvjax checkpoint-sweep --run_dirs=<run> --probe_set={output}")
