"""Draw a symbolic key-value benchmark from a config.

The same config gives the same bytes. Settings that cannot work are refused before anything is drawn.
"""

from __future__ import annotations

from absl import flags

from kvjax.commands import common

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "config",
    None,
    "Benchmark config: a JSON file, or the name of a shipped one, such as symbolic_kv_base.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "output_dir", None, "Where to write the benchmark; by default the config's output_dir.", flag_values=FLAGS
)
flags.DEFINE_bool("overwrite", False, "Replace an existing benchmark, once the new one is whole.", flag_values=FLAGS)


def run() -> None:
    from pathlib import Path

    from kvjax.config.benchmark import BenchmarkConfig
    from kvjax.config.files import find_config, read_config
    from kvjax.task.benchmark import generate_benchmark

    config = read_config(find_config(common.required(FLAGS, "config"), "benchmark"), BenchmarkConfig)
    output_dir = Path(FLAGS.output_dir or config.output_dir)
    metadata = generate_benchmark(config, output_dir, overwrite=FLAGS.overwrite)
    for split, facts in metadata["splits"].items():
        print(f"{split:<16} {facts['num_samples']:>6} streams  {facts['num_query_events']:>6} reads")
    print(f"Benchmark in {output_dir}.")
    print(f"Next: kvjax generate-probe-set --benchmark_dir={output_dir} --output=probe_set.jsonl")
