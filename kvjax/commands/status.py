"""Say which of the four conditions for circuit work each run meets, why, and what to run next.

They are: reference fixed, probe set fixed, sweep complete, windows identified. Only reads; nothing is measured.
"""

from __future__ import annotations

from absl import flags

from kvjax.commands import common

FLAGS = flags.FlagValues()
flags.DEFINE_list("run_dirs", None, "Run directories: a comma list, globs allowed.", flag_values=FLAGS)
flags.DEFINE_bool("require", False, "Fail with status 2 unless every run meets every condition.", flag_values=FLAGS)
flags.DEFINE_bool("reasons", True, "Print why each condition holds or fails.", flag_values=FLAGS)


def run() -> None:
    from kvjax.artifacts.run_dir import find_run_dirs
    from kvjax.errors import unusable
    from kvjax.report.text import print_readiness
    from kvjax.windows.readiness import readiness

    found = [readiness(run_dir) for run_dir in find_run_dirs(common.required(FLAGS, "run_dirs"))]
    for state in found:
        print_readiness(state, reasons=FLAGS.reasons)
    ready = sum(state.ready for state in found)
    print(f"\n{ready} of {len(found)} run{'s' if len(found) > 1 else ''} ready for circuit work")
    if FLAGS.require and ready < len(found):
        state = next(state for state in found if not state.ready)
        failing = next(condition for condition in state.conditions if not condition.holds)
        raise unusable(state.run.path, failing.name, failing.reason)
