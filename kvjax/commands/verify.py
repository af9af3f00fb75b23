"""Say whether results are what their inputs give: hashes again, certificates again, a sample measured again.

Nothing is written. Each run gets a line for everything that was compared: it holds, it differs, or it could not be
vouched for, and why. Ends with status 1 if anything differs, and with 2 if a run cannot be opened or has no sweep.
"""

from __future__ import annotations

from kvjax.commands.runtime import progress_of, start_jax
from kvjax.pipeline.settings import Display, RunsOnBenchmark, Runtime, VerifySettings

SETTINGS = (RunsOnBenchmark, VerifySettings, Display, Runtime)


def run(runs: RunsOnBenchmark, settings: VerifySettings, display: Display, runtime: Runtime) -> int:
    from kvjax.pipeline.text import print_verified
    from kvjax.pipeline.verify import verify

    start_jax(runtime)
    verified = verify(runs, settings, progress_of(display))
    print_verified(verified)
    return int(any(one.differs for one in verified))
