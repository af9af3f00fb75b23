"""Say whether results are what their inputs give: hashes again, certificates again, a sample measured again.

Nothing is written. Each run, and each comparison that is named, gets a line for everything that was compared: it
holds, it differs, or it could not be vouched for, and why. Ends with status 1 if anything differs, and with 2 if a
run cannot be opened or has no sweep.
"""

from __future__ import annotations

from kvjax.commands.runtime import engine_of, progress_of, start_jax
from kvjax.pipeline.settings import Display, RunsOnBenchmark, Runtime, VerifySettings, WorkplaceSettings

SETTINGS = (RunsOnBenchmark, VerifySettings, WorkplaceSettings, Display, Runtime)


def run(
    runs: RunsOnBenchmark, settings: VerifySettings, workplace: WorkplaceSettings, display: Display, runtime: Runtime
) -> int:
    from kvjax.pipeline.over_runs import over_runs
    from kvjax.pipeline.text import print_verified
    from kvjax.pipeline.verify import verify, verify_comparisons

    start_jax(runtime)
    work = {"progress": progress_of(display), "engine": engine_of(workplace, runtime)}
    compared = verify_comparisons(settings)
    verified = [*over_runs("verification", verify, runs, settings, needs="nothing", **work), *compared]
    print_verified(verified)
    return int(any(one.differs for one in verified))
