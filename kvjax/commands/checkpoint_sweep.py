"""Measure every checkpoint of one or several runs: behaviour, residual stream, heads, MLPs.

Each run gets, in its analysis folder, one row per checkpoint (checkpoint_metrics.jsonl), every array labelled
(checkpoint_metrics.nc), full component tables (component_candidates/) and the provenance (sweep.json). Checkpoints
measured before are not measured again.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from absl import flags

from kvjax.commands import common
from kvjax.report.text import print_sweep_report

if TYPE_CHECKING:
    from kvjax.sweeps.results import SweepReport

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
flags.DEFINE_enum(
    "probe",
    "ridge",
    ["ridge", "logistic", "none"],
    "Trained linear probes to fit; logistic adds multinomial logistic ones at the steps that --steps names.",
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "event_drift",
    True,
    "Measure drift of single reads' states and linear CKA too.",
    flag_values=FLAGS,
)
flags.DEFINE_string("checkpoint_batch", "auto", "Checkpoints per device call: auto or a number.", flag_values=FLAGS)
flags.DEFINE_float(
    "memory_gb",
    None,
    "Memory that --checkpoint_batch=auto may fill: of each accelerator, or of the machine on a CPU.",
    lower_bound=0.1,
    flag_values=FLAGS,
)
common.define_precision_flag(FLAGS)
flags.DEFINE_bool(
    "skip_bad",
    False,
    "List unusable checkpoints and measure the others, instead of stopping.",
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "follow",
    False,
    "Go on while the runs still train: look for new checkpoints twice a minute, until every run is complete.",
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "overwrite", False, "Measure again, also where the earlier sweep had other settings.", flag_values=FLAGS
)

_FOLLOW_SECONDS = 30


def _refused_files(report: SweepReport) -> list[tuple]:
    """Lists the unusable checkpoints with size and time; one that is still being written changes these."""
    files = [report.run.layout.checkpoints / name for name in report.log.refused]
    return [(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def run() -> None:
    import dataclasses
    import functools

    from kvjax.api import sweep_reports
    from kvjax.errors import InputError, bad_argument
    from kvjax.sweeps.ablations import chosen_ablations
    from kvjax.sweeps.settings import SweepSettings

    common.start_jax(FLAGS)
    settings = SweepSettings(
        ablations=chosen_ablations(FLAGS.ablations),
        resample_draws=FLAGS.resample_draws,
        probe=FLAGS.probe,
        event_drift=FLAGS.event_drift,
        precision=FLAGS.precision,
        checkpoint_batch=FLAGS.checkpoint_batch,
        memory_gb=FLAGS.memory_gb,
        # A checkpoint that is still being written is unusable now, and measured once it stays as it is.
        skip_bad=FLAGS.skip_bad or FLAGS.follow,
        overwrite=FLAGS.overwrite,
    )
    if FLAGS.probe == "logistic" and FLAGS.steps == "all":
        raise bad_argument(
            "probe", "steps to fit logistic probes at (`steps`), for they take far longer than ridge", "`steps=all`"
        )
    refused: set[tuple] = set()
    while True:
        reports = sweep_reports(
            common.required(FLAGS, "run_dirs"),
            probe_set=FLAGS.probe_set,
            benchmark_dir=FLAGS.benchmark_dir,
            steps=FLAGS.steps,
            reference=FLAGS.reference,
            settings=settings,
            progress=functools.partial(common.progress_bar, unit="checkpoints", show=FLAGS.progress),
        )
        for report in reports:
            print_sweep_report(report)
        before, refused = refused, {seen for report in reports for seen in _refused_files(report)}
        if not FLAGS.follow or (refused == before and all(report.run.complete for report in reports)):
            break
        settings = dataclasses.replace(settings, overwrite=False)  # once; later rounds measure what is new
        time.sleep(_FOLLOW_SECONDS)
    useless = [report for report in reports if not report.rows]
    if useless:
        reason = next(iter(useless[0].log.refused.values()))
        raise InputError(f"{useless[0].run.path}: expected at least one usable checkpoint; found none ({reason})")
    example = reports[0].run.layout.arrays
    print(f"Next: xarray.open_dataset('{example}') (README, \"Reading the results\").")
