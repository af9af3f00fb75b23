"""What commands print of stages, one function each, and the command to run next."""

from __future__ import annotations

import collections
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvjax.artifacts.layout import PROBE_SET_FILE
from kvjax.errors import command
from kvjax.report.story import print_story
from kvjax.report.text import print_windows_report, say

if TYPE_CHECKING:
    from kvjax.artifacts.run_dir import RunDir
    from kvjax.converters.convert_run import ConversionReport
    from kvjax.pipeline.checks import Verified
    from kvjax.pipeline.compare_seeds import WrittenComparison
    from kvjax.pipeline.evaluate import EvaluatedCheckpoint
    from kvjax.pipeline.generate import GeneratedBenchmark
    from kvjax.pipeline.report import WrittenReport
    from kvjax.pipeline.status import Readiness
    from kvjax.pipeline.train import TrainedRun
    from kvjax.pipeline.windows import ToldWindows
    from kvjax.task.probe_set import ProbeSet


def print_next(name: str, **flags: Any) -> None:
    """Prints the command to run next."""
    say(f"Next: {command(name, **flags)}")


def print_benchmark(drawn: GeneratedBenchmark) -> None:
    """Prints the size of every split and where the benchmark is."""
    for split, facts in drawn.splits.items():
        say(f"{split:<16} {facts['num_samples']:>6} streams  {facts['num_query_events']:>6} reads")
    say(f"Benchmark in {drawn.path}.")
    print_next("generate-probe-set", benchmark_dir=drawn.path, output=PROBE_SET_FILE)


def print_trained(runs: Sequence[TrainedRun]) -> None:
    """Prints each seed's last accuracies and its directory."""
    for run in runs:
        accuracies = "  ".join(f"{split} {row['answer_accuracy']:.3f}" for split, row in run.evaluations.items())
        say(f"seed {run.seed}: {accuracies}  in {run.path}")
    print_next("checkpoint-sweep", run_dirs=[run.path for run in runs])


def print_probe_set(probe: ProbeSet) -> None:
    """Prints how many records and reads of each split a probe set has."""
    manifest = probe.manifest
    for split, count in manifest.split_counts.items():
        reads = sum(manifest.coverage[split]["active_keys"].values())
        added = manifest.added_for_coverage[split]
        more = f"  ({added} beyond --examples_per_split, for coverage)" if added else ""
        say(f"{split:<16} {count:>4} records  {reads:>5} reads{more}")
    say(f"{manifest.fit_split:<16} {manifest.num_fit_records:>4} records to fit on")
    say(f"Probe set in {probe.path}.")
    say(f"Give it to sweeps of runs on this benchmark: --probe_set={shlex.quote(str(probe.path))}")


def print_conversions(reports: Sequence[ConversionReport]) -> None:
    """Prints where the parameters of each run are and how far they agree with PyTorch."""
    for report in reports:
        say(f"{len(report.steps)} checkpoints, steps {report.steps[0]} to {report.steps[-1]}, in {report.folder}")
        if report.largest_difference is not None:
            say(
                f"  parity with PyTorch: logits within {report.largest_difference:.1e} of the largest, "
                f"{report.near_ties} near-ties"
            )
        if report.vouched is not None and report.vouched.differs is None:
            say(f"  {report.vouched}")
        for check in report.metric_checks:
            say(
                f"  step {check.step} {check.split}: recorded {check.recorded:.6f}, measured {check.measured:.6f} "
                f"({check.num_events} reads)"
            )
        for note in report.notes:
            say(f"  note: {note}")


def print_evaluations(evaluated: Sequence[tuple[EvaluatedCheckpoint, Path]]) -> None:
    """Prints accuracy, margin and loss of each run on each split, and where everything is."""
    for result, path in evaluated:
        say(f"{result.run.path}, step {result.step} ({result.path.name})")
        for split, evaluation in result.splits.items():
            say(
                f"  {split:<16} answer accuracy {evaluation.answer_accuracy:.4f}  "
                f"margin {evaluation.answer_margin:7.2f}  loss {evaluation.loss:.3f}  {evaluation.total} reads"
            )
        for note in result.notes:
            say(f"  note: {note}")
        say(f"  in {path}")


def print_ranking(ranking: dict[str, Any], output: str | None) -> None:
    """Prints the runs in order, each with its reason, and the one selected."""
    for row in ranking["candidates"]:
        accuracies = "  ".join(f"{split} {accuracy:.3f}" for split, accuracy in row["accuracies"].items())
        say(f"{row['rank'] or '-':>3}  {row['run_dir']} (step {row['step']}): {accuracies}")
        say(f"     {row['reason']}")
    say(f"Selected: {ranking['selected'] or 'none'} ({ranking['reason']})")
    if output:
        say(f"Ranking in {output}")


def print_told_windows(found: Sequence[ToldWindows], *, show: int) -> None:
    """Prints each run's verdict and windows, and in a sentence each what happened in them."""
    for one in found:
        print_windows_report(one.windows, show=show)
        say("  What happened:")
        print_story(one.story, in_full=False)
        say(f"  All of it in words: {one.windows.run.layout.story_text}")


def print_readiness(states: Sequence[Readiness], *, reasons: bool) -> None:
    """Prints which conditions for circuit work each run meets, the next command, and how many runs are ready."""
    for state in states:
        say(f"\n{state.run.config.title}, {state.run.path}")
        for name, condition in state.conditions.items():
            mark = "yes" if condition.holds else "no "
            say(f"  {mark}  {name}{f': {condition.reason}' if reasons else ''}")
        ready = command("intervene", run_dirs=[state.run.path])
        following = ready if state.ready else state.next_command
        say(f"  Next: {following or 'nothing to run; see the reason above'}")
        print_told(state, in_full=len(states) == 1)
    count = sum(state.ready for state in states)
    say(f"\n{count} of {len(states)} run{'s' if len(states) > 1 else ''} ready for circuit work")


def print_verified(verified: Sequence[Verified]) -> None:
    """Prints what could be vouched for in each run or comparison, what differs, and what could not be compared."""
    for one in verified:
        say(f"\n{one.title}")
        for check in one.checks:
            say(f"  {check.verdict:<7}  {check.subject}: {check.reason}")
    counts = collections.Counter(check.verdict for one in verified for check in one.checks)
    say(f"\n{counts['holds']} hold, {counts['differs']} differ, {counts['open']} could not be vouched for")


def print_told(state: Readiness, *, in_full: bool) -> None:
    """Prints what happened in a run, or why that is not told; nothing before there are birth windows."""
    current, story = state.told.current, state.told.story
    if not current.holds and not state.run.layout.birth_windows.is_file():
        return
    if not current.holds:
        say(f"  The story is not up to date: {current.reason} ({current.command})")
    if story is not None:
        print_story(story, in_full=in_full)
        say(f"  The whole story: {state.run.layout.story_text}")


def print_sweep_example(run: RunDir) -> None:
    """Prints the line of Python that opens a run's results."""
    path = run.layout.arrays
    say(f'Next: xarray.open_dataset({str(path)!r}) (README, "From Python").')


def print_comparison(made: WrittenComparison) -> None:
    """Prints what a comparison found, in sentences, and where its files are."""
    document = made.comparison.document
    for sentence in document["findings"]:
        say(sentence)
    for sentence in document["notes"]:
        say(f"note: {sentence}")
    say(f"Comparison in {made.layout.page}, with {made.layout.comparison.name}, {made.layout.arrays.name} and figures.")


def in_minutes(seconds: float) -> str:
    """Writes a time as people read it: seconds below a minute, else minutes, or hours."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def print_report(written: WrittenReport) -> None:
    """Prints where a report and its figures are."""
    if written.figures:
        say(f"{len(written.figures)} figures in {written.figures[0].parent}")
    say(f"Open {written.path} in a browser.")
