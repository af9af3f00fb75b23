"""Measure every checkpoint of one or several runs: behaviour, residual stream, heads, MLPs.

Each run gets, in its analysis folder, one row per checkpoint (checkpoint_metrics.jsonl), every array labelled
(checkpoint_metrics.nc), full component tables (component_candidates/) and the provenance (sweep.json). Checkpoints
measured before are not measured again.
"""

from __future__ import annotations

from absl import flags

from kvjax.commands import common

FLAGS = flags.FlagValues()
common.define_run_flags(FLAGS)
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

_SHOWN_ROWS = 24


def run() -> None:
    from kvjax.artifacts.run_dir import find_run_dirs
    from kvjax.sweep.analysis import prepare_run, sweep_runs
    from kvjax.sweep.stream import SweepSettings

    settings = SweepSettings(
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
        reports = sweep_runs(prepared, common.torch_loader(), settings=settings, advance=advance)
    for report in reports:
        _print_report(report)


def _print_report(report) -> None:
    config = report.run.config
    print(f"\n{config.run_name} (seed {config.seed})")
    print("   step  accuracy  held-out    margin      r   loss  heads by accuracy drop")
    rows = report.rows
    hidden = len(rows) - _SHOWN_ROWS
    for row in rows if hidden <= 0 else rows[: _SHOWN_ROWS // 2] + rows[-_SHOWN_ROWS // 2 :]:
        heads = "  ".join(f"L{h['layer']}H{h['head']} {h['value']:.3f}" for h in row["top_heads_by_ablation"][:3])
        print(
            f"{row['step']:>7} {_cell(row['answer_accuracy'], '9.3f')} {_cell(row['heldout_answer_accuracy'], '9.3f')} "
            f"{_cell(row['answer_margin'], '9.2f')} {_cell(row['r'], '6.3f')} {_cell(row['loss'], '6.3f')}  {heads}"
        )
    if hidden > 0:
        print(f"  ({hidden} checkpoints between are in the table)")
    for file, reason in report.log.refused.items():
        print(f"skipped {file}: {reason}")
    for note in report.notes:
        print(f"note: {note}")
    log, analysis = report.log, report.run.analysis
    print(
        f"{len(log.measured)} measured, {len(log.reused)} reused, {len(log.refused)} skipped. Results in {analysis}: "
        f"rows in checkpoint_metrics.jsonl, arrays in checkpoint_metrics.nc."
    )
    print(f"Next: xarray.open_dataset('{analysis}/checkpoint_metrics.nc') (README, \"Reading the results\").")


def _cell(value: float | None, form: str) -> str:
    return format(value, form) if value is not None else "-".rjust(int(form.partition(".")[0]))
