"""See a lookup mechanism form: draw a benchmark, train two seeds, measure every checkpoint, find what formed when.

Takes a few minutes on two CPU cores. Run again, it goes on where it stopped and repeats nothing that is there.
"""

from __future__ import annotations

from absl import flags

from kvjax.commands import common
from kvjax.report.text import print_sweep_report, print_windows_report

FLAGS = flags.FlagValues()
common.define_runtime_flags(FLAGS)
flags.DEFINE_string("output_dir", "quickstart", "Where everything goes.", flag_values=FLAGS)
flags.DEFINE_string(
    "benchmark_config", "symbolic_kv_quickstart", "Benchmark config, shipped or a JSON file.", flag_values=FLAGS
)
flags.DEFINE_string(
    "train_config", "symbolic_kv_quickstart", "Training config, shipped or a JSON file.", flag_values=FLAGS
)
flags.DEFINE_list("seeds", ["7", "11"], "Seeds to train.", flag_values=FLAGS)
flags.DEFINE_bool("progress", True, "Show progress bars with the time left.", flag_values=FLAGS)


def run() -> None:
    import functools
    from pathlib import Path

    from kvjax.api import sweep_reports
    from kvjax.config.benchmark import BenchmarkConfig
    from kvjax.config.files import find_config, read_config
    from kvjax.config.train import TrainConfig
    from kvjax.config.windows import WindowConfig
    from kvjax.converters.training import run_directories, train_missing_runs
    from kvjax.errors import unusable
    from kvjax.report.figures import head_ablation_figure, save_figure, trajectory_figure
    from kvjax.sweeps.settings import SweepSettings
    from kvjax.task.benchmark import Benchmark, generate_benchmark
    from kvjax.windows.run import write_windows

    common.start_jax(FLAGS)
    output = Path(FLAGS.output_dir)
    benchmark_dir = output / "benchmark"
    settings = read_config(find_config(FLAGS.benchmark_config, "benchmark"), BenchmarkConfig)
    if not benchmark_dir.exists():
        print(f"1/5  drawing the benchmark: {settings.num_keys} keys, {settings.num_values} values", flush=True)
        generate_benchmark(settings, benchmark_dir, overwrite=False)
    benchmark = Benchmark.open(benchmark_dir)
    if not benchmark.has_config(settings):
        raise unusable(benchmark_dir, f"the benchmark of {FLAGS.benchmark_config} (or another --output_dir)", "another")

    config = read_config(find_config(FLAGS.train_config, "train"), TrainConfig)
    config = config.model_copy(update={"benchmark_dir": str(benchmark_dir.resolve())})
    runs = run_directories(config, common.integers("seeds", FLAGS.seeds), str(output / "runs"))
    print(f"2/5  training {len(runs)} seeds, {config.num_steps} steps each, as one program", flush=True)
    with common.progress_bar(len(runs) * config.num_steps, "steps", show=FLAGS.progress) as advance:
        train_missing_runs(runs, benchmark, advance=advance)

    print("3/5  measuring every checkpoint: behaviour, logit lens, attention, every head and MLP ablated", flush=True)
    reports = sweep_reports(
        [str(path) for path in runs],
        probe_set=None,
        benchmark_dir=None,
        steps="all",
        reference="final",
        settings=SweepSettings(),
        progress=functools.partial(common.progress_bar, unit="checkpoints", show=FLAGS.progress),
    )
    for report in reports:
        print_sweep_report(report)

    print("\n4/5  drawing figures")
    swept = [report.dataset for report in reports]
    figures = output / "figures"
    for name, figure in (
        ("trajectories", trajectory_figure(swept)),
        ("head_ablations", head_ablation_figure(swept)),
    ):
        print("     " + ", ".join(map(str, save_figure(figure, figures, name))))
    print(f"     Look at {figures / 'trajectories.png'} first.")

    print("\n5/5  looking for birth windows", flush=True)
    window_config = read_config(find_config("default", "windows"), WindowConfig)
    for report in write_windows([report.run for report in reports], window_config):
        print_windows_report(report, show=8)
    print(f"Next: kvjax status --run_dirs='{output}/runs/*'")
