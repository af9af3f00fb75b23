"""Intervene inside birth windows: what carries the behaviour, and how information flows.

In every checkpoint of a window: activation and path patching between clean and corrupted streams, necessity and
sufficiency of component sets, states across checkpoints, residual subspaces, neurons, attribution patching. Each kind
gets, under analysis/interventions/, a readable summary (.json) and every number (.nc). What was measured before is not
measured again, so that a call that was stopped goes on where it was.
"""

from __future__ import annotations

from absl import flags

from kvjax.commands import common

FLAGS = flags.FlagValues()
common.define_run_flags(FLAGS)
common.define_runtime_flags(FLAGS)
flags.DEFINE_string(
    "probe_set",
    None,
    "Probe set that pairs are made from; by default the run's own, analysis/probe_set.jsonl.",
    flag_values=FLAGS,
)
flags.DEFINE_string("window", "all", "Window to intervene in: all, or the center step of one.", flag_values=FLAGS)
flags.DEFINE_string(
    "steps",
    None,
    "Checkpoints to take instead of windows: all, or steps and ranges such as 250,1000-4000.",
    flag_values=FLAGS,
)
flags.DEFINE_list(
    "kinds",
    ["activation_patching", "path_patching", "necessity", "across_checkpoints", "subspaces", "neurons", "attribution"],
    "Kinds of intervention.",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "pairs_per_kind", None, "Pairs of each kind to use, the first; by default all 96.", lower_bound=2, flag_values=FLAGS
)
flags.DEFINE_list(
    "components",
    None,
    "Components, such as L1H3,L1.mlp, whose set is tested for sufficiency; by default the smallest faithful set.",
    flag_values=FLAGS,
)
common.define_precision_flag(FLAGS)
flags.DEFINE_bool(
    "force", False, "Go on although the run is not ready for circuit work (kvjax status).", flag_values=FLAGS
)
flags.DEFINE_bool(
    "overwrite", False, "Measure all of it again, also where an earlier call had other settings.", flag_values=FLAGS
)


def run() -> None:
    import functools

    from kvjax.api import intervene_in_runs
    from kvjax.intervene.analysis import InterventionSettings, chosen_kinds
    from kvjax.report.text import print_intervention_report

    common.start_jax(FLAGS)
    settings = InterventionSettings(
        kinds=chosen_kinds(FLAGS.kinds),
        window=FLAGS.window,
        steps=FLAGS.steps,
        pairs_per_kind=FLAGS.pairs_per_kind,
        components=tuple(FLAGS.components) if FLAGS.components else None,
        precision=FLAGS.precision,
        force=FLAGS.force,
        overwrite=FLAGS.overwrite,
    )
    reports = intervene_in_runs(
        common.required(FLAGS, "run_dirs"),
        probe_set=FLAGS.probe_set,
        benchmark_dir=FLAGS.benchmark_dir,
        settings=settings,
        progress=functools.partial(common.progress_bar, unit="studies", show=FLAGS.progress),
    )
    for report in reports:
        print_intervention_report(report)
