"""Convert a run's PyTorch checkpoints to Flax parameters (--to=flax), or the stored parameters back (--to=torch).

To flax: one Orbax store per run in analysis/converted, with a parity certificate per checkpoint. To torch: .pt files
in analysis/exported_torch that hold exactly the stored parameters.
"""

from __future__ import annotations

from kvjax.commands.runtime import engine_of, progress_of, start_jax
from kvjax.pipeline.settings import (
    ConvertSettings,
    Display,
    ResultSettings,
    RunsOnBenchmark,
    Runtime,
    WorkplaceSettings,
)

SETTINGS = (RunsOnBenchmark, ConvertSettings, ResultSettings, WorkplaceSettings, Display, Runtime)


def run(
    runs: RunsOnBenchmark,
    settings: ConvertSettings,
    results: ResultSettings,
    workplace: WorkplaceSettings,
    display: Display,
    runtime: Runtime,
) -> None:
    from kvjax.artifacts.find_runs import names_of_results
    from kvjax.pipeline.convert import convert
    from kvjax.pipeline.over_runs import over_runs
    from kvjax.pipeline.text import print_conversions, print_next
    from kvjax.report.text import say

    start_jax(runtime)
    work = {"progress": progress_of(display), "results": results, "engine": engine_of(workplace, runtime)}
    print_conversions(over_runs("conversion", convert, runs, settings, **work))
    if settings.to == "flax":
        following = names_of_results(runs.run_dirs, results.output_dir)
        print_next("checkpoint-sweep", run_dirs=following, benchmark_dir=runs.benchmark_dir)
    else:
        say("Next: torch.load any of them.")
