"""The stage that intervenes in birth windows."""

from __future__ import annotations

from collections.abc import Sequence

from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import InputError, command
from kvjax.execution.inputs import OpenedInputs, prepare_run
from kvjax.intervene.analysis import InterventionReport, intervene_in_run
from kvjax.intervene.plan import InterventionPlan, chosen_windows, plan_interventions
from kvjax.intervene.settings import InterventionSettings
from kvjax.pipeline.current import Current
from kvjax.pipeline.progress import Progress, no_progress
from kvjax.pipeline.settings import DEFAULT_RESULTS, PairSource, ResultSettings, RunsOnBenchmark
from kvjax.pipeline.status import readiness
from kvjax.pipeline.story import complete_story
from kvjax.pipeline.sweep import checkpoint_source
from kvjax.pipeline.written_runs import open_to_write


def intervene(
    runs: RunsOnBenchmark,
    source: PairSource,
    settings: InterventionSettings,
    progress: Progress = no_progress,
    results: ResultSettings = DEFAULT_RESULTS,
) -> list[InterventionReport]:
    """Intervenes in the birth windows of runs and writes `analysis/interventions/` of each.

    Raises:
      InputError: a run is not ready for circuit work, something was measured before with other settings, or an input
        cannot be used.
    """
    with open_to_write(runs, results) as found:
        plans = plan(found, runs.benchmark_dir, source, settings)
        reports = []
        with progress(sum(len(planned.tasks) for planned in plans), "studies") as advance:
            for planned in plans:
                source_of_run = checkpoint_source(planned.inputs)
                reports += intervene_in_run(planned, source_of_run, settings, advance=advance)
                complete_story(planned.inputs.run)
        return reports


def plan(
    found: Sequence[RunDir], benchmark_dir: str | None, source: PairSource, settings: InterventionSettings
) -> list[InterventionPlan]:
    """Says what is to be done in runs, so that a refusal comes before anything is measured.

    Raises:
      InputError: as `intervene`, as far as it can be known.
    """
    for run in found if not settings.force else ():
        check_ready(run)
    opened, plans = OpenedInputs(), []
    for run, windows in [(run, chosen_windows(run, settings)) for run in found]:
        inputs = prepare_run(
            run,
            benchmark_dir=benchmark_dir,
            probe_set=source.probe_set,
            steps="all",
            reference=str(max(run.checkpoints)),
            opened=opened,
        )
        plans.append(plan_interventions(inputs, windows, settings))
    return plans


def check_ready(run: RunDir) -> None:
    """Refuses a run on which circuit work would rest on sand.

    Raises:
      InputError: a condition for circuit work fails; the message names it and the command that meets it.
    """
    state = readiness(run)
    if state.failing is not None:
        advice = f"run {state.next_command}, or" if state.next_command else "or"
        raise InputError(
            f'{run.path}: expected a run ready for circuit work; found that "{state.failing}" does not hold: '
            f"{state.conditions[state.failing].reason} ({advice} go on with `force`)"
        )


def interventions_are_current(run: RunDir, settings: InterventionSettings) -> Current:
    """Says whether every kind of intervention is measured in every window, on the checkpoints and pairs there are."""
    rerun = command("intervene", run_dirs=[run.path])
    try:
        (planned,) = plan([run], None, PairSource(), settings)
        missing = planned.to_measure()
    except InputError as error:
        return Current(False, str(error), rerun)
    if missing:
        kinds = ", ".join(dict.fromkeys(task.kind for task in missing))
        return Current(False, f"{len(missing)} of {len(planned.tasks)} studies are not measured ({kinds})", rerun)
    return Current(True, f"all {len(planned.tasks)} studies are measured")
