"""The stage that measures every checkpoint."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal

from kvjax.artifacts.find_runs import named_paths
from kvjax.converters.cached_loader import CachedLoader
from kvjax.errors import InputError, note, unusable
from kvjax.execution.inputs import OpenedInputs, RunInputs, prepare_run
from kvjax.model.checkpoint import CheckpointSource
from kvjax.pipeline.over_runs import over_runs
from kvjax.pipeline.progress import Progress, no_progress
from kvjax.pipeline.settings import DEFAULT_RESULTS, ResultSettings, RunsOnBenchmark, SweepInputs
from kvjax.pipeline.shared_sweep import InGroup, OnEngine, Sharing, measure_in_shares
from kvjax.pipeline.written_runs import open_to_write
from kvjax.sweeps.run import sweep_runs
from kvjax.sweeps.settings import SweepSettings
from kvjax.units.unit import IN_PROCESS, Engine

if TYPE_CHECKING:
    from kvjax.sweeps.results import SweepReport
    from kvjax.units.leader import Leader

Mixed = Literal["separate", "join", "refuse"]


def sweep(
    runs: RunsOnBenchmark,
    inputs: SweepInputs,
    settings: SweepSettings,
    progress: Progress = no_progress,
    results: ResultSettings = DEFAULT_RESULTS,
    *,
    mixed: Mixed = "separate",
    still_training: bool = False,
    sharing: Sharing | None = None,
) -> list[SweepReport]:
    """Measures checkpoints of runs, writes their tables and returns what each has.

    Args:
      runs: the runs.
      inputs: what is measured.
      settings: how.
      progress: shows how far it is.
      results: where tables go.
      mixed: whether the results are put into one (`join`, `refuse`), and what becomes of runs that would be measured
        on several benchmarks or probe sets then.
      still_training: whether unfinished runs have no final checkpoint yet, instead of the last one.
      sharing: who measures the checkpoints of each run together; None for this process alone.

    Raises:
      InputError: a run, its benchmark, the probe set or a checkpoint cannot be used, a run was measured before with
        other settings, or `mixed` refuses the runs.
    """
    opened = OpenedInputs()
    with open_to_write(runs, results) as found:
        prepared = [
            prepare_run(
                run,
                benchmark_dir=runs.benchmark_dir,
                probe_set=inputs.probe_set,
                steps=inputs.steps,
                reference=inputs.reference,
                still_training=still_training,
                opened=opened,
            )
            for run in found
        ]
        _check_same_records(prepared, mixed)
        with progress(sum(len(work.wanted) for work in prepared), "checkpoints") as advance:
            elsewhere = sharing and functools.partial(
                measure_in_shares,
                sharing=sharing,
                advance=advance,
                benchmark_dir=runs.benchmark_dir,
                inputs=inputs,
                settings=settings,
                still_training=still_training,
            )
            return sweep_runs(prepared, checkpoint_source, settings=settings, advance=advance, elsewhere=elsewhere)


def sweep_over_runs(
    runs: RunsOnBenchmark,
    inputs: SweepInputs,
    settings: SweepSettings,
    progress: Progress = no_progress,
    results: ResultSettings = DEFAULT_RESULTS,
    engine: Engine = IN_PROCESS,
    *,
    group: Leader | None = None,
    still_training: bool = False,
) -> list[SweepReport]:
    """Measures checkpoints of runs wherever an engine or a group of processes does it.

    A group shares the checkpoints of every run. Workers of an engine measure a run each; if there are more of them than
    runs, they share checkpoints as well.

    Args:
      runs, inputs, settings, progress, results, still_training: see `sweep`.
      engine: where it is done.
      group: the processes that share the work; None for this one alone.

    Raises:
      InputError: as `sweep`, or a process of the group is gone. What was measured stays.
    """
    shared = {"results": results, "progress": progress, "still_training": still_training}
    sharing = None
    if group is not None:
        sharing = InGroup(group)
    elif engine.spreads:
        named = sum(1 for _ in named_paths(runs.run_dirs, needs="step checkpoints"))
        number = -(-engine.workers() // max(1, named))
        sharing = OnEngine(engine, number) if number > 1 else None
    if sharing is not None:
        return sweep(runs, inputs, settings, **shared, sharing=sharing)
    return over_runs("sweep", sweep, runs, inputs, settings, **shared, engine=engine)


def _check_same_records(prepared: list[RunInputs], mixed: Mixed) -> None:
    """Compares the benchmarks and probe sets of runs before any of them is measured."""
    first = prepared[0]
    for other in prepared[1:] if mixed != "separate" else ():
        for what, theirs, ours in (
            ("benchmark", other.benchmark.sha256, first.benchmark.sha256),
            ("probe set", other.probe.manifest.content_sha256, first.probe.manifest.content_sha256),
        ):
            if theirs == ours:
                continue
            if mixed == "refuse":
                expected = f"the {what} of {first.run.path}, {ours[:12]} (or one `probe_set` for all, or `mixed=join`)"
                raise unusable(other.run.path, expected, theirs[:12])
            note(f"{other.run.path}: measured on another {what} than {first.run.path}, {theirs[:12]} and {ours[:12]}")


def checkpoint_source(work: RunInputs) -> CheckpointSource:
    """Opens where a prepared run's checkpoints come from: its PyTorch files, through the parameter store."""
    return CachedLoader(work.run, work.benchmark, certify_on=work.certificate_tokens)


def check_usable(reports: list[SweepReport]) -> None:
    """Refuses a sweep of a run none of whose checkpoints could be used.

    Raises:
      InputError: there is such a run; the message gives the first reason.
    """
    for report in reports:
        if not report.rows:
            reason = next(iter(report.log.refused.values()))
            raise InputError(f"{report.run.path}: expected at least one usable checkpoint; found none ({reason})")
