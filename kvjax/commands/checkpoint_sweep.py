"""Measure every checkpoint of one or several runs: behaviour, residual stream, heads, MLPs.

Each run gets, in its analysis folder, one row per checkpoint (checkpoint_metrics.jsonl), every array labelled
(checkpoint_metrics.nc), full component tables (component_candidates/) and the provenance (sweep.json). Checkpoints
measured before are not measured again.
"""

from __future__ import annotations

from absl import flags

from kvjax.commands import common
from kvjax.commands.printing import print_sweep_report

FLAGS = flags.FlagValues()
common.define_run_flags(FLAGS)
common.define_runtime_flags(FLAGS)
flags.DEFINE_string(
    "probe_set",
    None,
    "Probe set to measure on; by default analysis/probe_set.jsonl, made if absent.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "steps",
    "all",
    "Checkpoints to measure: all, or steps and ranges such as 250,1000-4000.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "reference",
    "final",
    "Checkpoint that drift is also measured to: final, best or a step.",
    flag_values=FLAGS,
)
flags.DEFINE_list(
    "ablations",
    ["zero", "mean", "resample"],
    "Kinds of head and MLP ablation: zero (always), mean, resample, and random, a step of the same length for scale.",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "resample_draws", 1, "Draws per resample ablation; drops are means over them.", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_enum("probe", "ridge", ["ridge", "none"], "Trained linear probes to fit.", flag_values=FLAGS)
flags.DEFINE_string("checkpoint_batch", "auto", "Checkpoints per device call: auto or a number.", flag_values=FLAGS)
flags.DEFINE_float(
    "memory_gb",
    None,
    "Accelerator memory that --checkpoint_batch=auto may fill.",
    lower_bound=0.1,
    flag_values=FLAGS,
)
flags.DEFINE_enum(
    "precision",
    "highest",
    ["highest", "default"],
    "Precision of float32 matrix products; default lets a GPU use TF32.",
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "skip_bad",
    False,
    "List unusable checkpoints and measure the others, instead of stopping.",
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "overwrite", False, "Measure again, also where the earlier sweep had other settings.", flag_values=FLAGS
)


def run() -> None:
    from kvjax.artifacts.run_dir import find_run_dirs
    from kvjax.errors import InputError
    from kvjax.sweep.ablations import chosen_ablations
    from kvjax.sweep.analysis import prepare_run, sweep_runs
    from kvjax.sweep.stream import SweepSettings

    common.start_jax(FLAGS)
    settings = SweepSettings(
        ablations=chosen_ablations(FLAGS.ablations),
        resample_draws=FLAGS.resample_draws,
        probe=FLAGS.probe,
        precision=FLAGS.precision,
        checkpoint_batch=FLAGS.checkpoint_batch,
        memory_gb=FLAGS.memory_gb,
        skip_bad=FLAGS.skip_bad,
        overwrite=FLAGS.overwrite,
    )
    prepared = [
        prepare_run(
            run_dir,
            benchmark_dir=FLAGS.benchmark_dir,
            probe_set=FLAGS.probe_set,
            steps=FLAGS.steps,
            reference=FLAGS.reference,
        )
        for run_dir in find_run_dirs(common.required(FLAGS, "run_dirs"))
    ]
    total = sum(len(work.wanted) for work in prepared)
    with common.progress_bar(total, "checkpoints", show=FLAGS.progress) as advance:
        reports = sweep_runs(prepared, common.torch_source, settings=settings, advance=advance)
    for report in reports:
        print_sweep_report(report)
    useless = [report for report in reports if not report.rows]
    if useless:
        reason = next(iter(useless[0].log.refused.values()))
        raise InputError(f"{useless[0].run.path}: expected at least one usable checkpoint; found none ({reason})")
    example = reports[0].run.analysis / "checkpoint_metrics.nc"
    print(f"Next: xarray.open_dataset('{example}') (README, \"Reading the results\").")
