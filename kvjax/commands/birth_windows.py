"""Find the few checkpoints between which something formed, from the sweep alone, or say that nothing did.

Each run gets analysis/birth_windows.json: a verdict, windows with their triggers, the order in which metrics moved, the
components that mattered before, inside and after, and the births of metrics. Can be repeated while a run still trains.
"""

from __future__ import annotations

from absl import flags

from kvjax.commands import common
from kvjax.report.text import print_windows_report

FLAGS = flags.FlagValues()
flags.DEFINE_list("run_dirs", None, "Run directories: a comma list, globs allowed.", flag_values=FLAGS)
flags.DEFINE_string("config", "default", "Window config, shipped or a JSON file.", flag_values=FLAGS)
flags.DEFINE_integer(
    "show",
    6,
    "Triggers, metrics and components printed per window.",
    lower_bound=1,
    flag_values=FLAGS,
)


def run() -> None:
    from kvjax.artifacts.run_dir import find_run_dirs
    from kvjax.config.files import find_config, read_config
    from kvjax.config.windows import WindowConfig
    from kvjax.windows.run import write_windows

    runs = find_run_dirs(common.required(FLAGS, "run_dirs"))
    reports = write_windows(runs, read_config(find_config(FLAGS.config, "windows"), WindowConfig))
    for report in reports:
        print_windows_report(report, show=FLAGS.show)
    print(f"Next: kvjax status --run_dirs={','.join(FLAGS.run_dirs)}")
