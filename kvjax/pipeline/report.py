"""The stage that puts what was measured on runs into one page: `kvjax report`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from kvjax import __version__
from kvjax.artifacts.comparison_schema import read_comparison
from kvjax.artifacts.factor_schema import read_factor
from kvjax.artifacts.files import FileHash, digest, replace_file
from kvjax.artifacts.find_comparisons import find_comparison_dirs
from kvjax.artifacts.find_runs import find_run_dirs
from kvjax.artifacts.layout import ComparisonLayout
from kvjax.artifacts.results import RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.tables import read_dataset
from kvjax.compare.aligned import SweptRun, named_runs
from kvjax.compare.settings import CompareSettings
from kvjax.errors import InputError, bad_argument, command, unusable
from kvjax.measure.declarations.components import drop_field
from kvjax.model.components import Component
from kvjax.model.transforms import plain_forward
from kvjax.opened_run import OpenedRun
from kvjax.pipeline.compare_seeds import FEWEST_RUNS, compare_runs
from kvjax.pipeline.current import Current
from kvjax.pipeline.progress import Progress, no_progress
from kvjax.pipeline.settings import ReportSettings, Runs
from kvjax.report.figures import save_figure
from kvjax.report.html import Page, RunPage, render
from kvjax.report.parts import Section
from kvjax.report.run_page import run_page
from kvjax.report.sections.attention import AttentionPatterns
from kvjax.report.sections.factors import factor_section
from kvjax.report.sections.overview import headline
from kvjax.report.sections.seeds import runs_section, seeds_section
from kvjax.report.shown_rows import rows_of_change
from kvjax.task.benchmark import Benchmark
from kvjax.task.pairs import StreamPair, open_pairs
from kvjax.task.probe_set import ProbeSet, open_probe_set
from kvjax.task.stream import Record

MOST_RUNS = 12  # that get a part of their own; of more, the page says what they have in common
_MOST_ATTENTION_STEPS = 8
_ATTENTION_HEADS = 4


@dataclasses.dataclass(frozen=True)
class WrittenReport:
    """Where a report is.

    Attributes:
      path: the HTML file.
      figures: files of its charts for papers; empty if none were asked for.
    """

    path: Path
    figures: Sequence[Path]


def report(settings: ReportSettings, progress: Progress = no_progress) -> WrittenReport:
    """Writes one HTML file about runs, their comparison and factors, and its charts as files if asked for.

    Raises:
      InputError: a run, a comparison or a factor cannot be used, or a file cannot be written. Results that a run lacks
        are no error: the page names the command that makes them.
    """
    page, path = make_page(settings, progress), report_path(settings)
    text = render(page)
    with replace_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    figures = []
    if settings.figures_dir is not None:
        for name, chart in page.charts().items():
            safe = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)
            figures += save_figure(chart.matplotlib(), Path(settings.figures_dir), safe)
    return WrittenReport(path, figures)


def report_path(settings: ReportSettings) -> Path:
    """Names the file that a report is written to: that of `output`, or beside the results of a single run."""
    if settings.output is not None:
        return Path(settings.output)
    runs = _runs(settings)
    return runs[0].layout.report if len(runs) == 1 else Path("report.html")


def report_is_current(settings: ReportSettings) -> Current:
    """Says whether a report is there and made from the results there are now."""
    path = report_path(settings)
    if not path.is_file():
        return Current(False, f"{path} does not exist")
    try:
        now = _made_from(settings, _runs(settings))
    except InputError as error:
        return Current(False, str(error))
    with path.open(encoding="utf-8", errors="replace") as file:
        found = re.search(r'name="kvjax-made-from" content="([0-9a-f]{64})"', file.read(4000))
    if found is None or found[1] != now:
        return Current(False, f"{path} shows results that have changed since")
    return Current(True, f"{path} shows the results there are")


def make_page(settings: ReportSettings, progress: Progress = no_progress) -> Page:
    """Collects everything that a report shows.

    Raises:
      InputError: as `report`.
    """
    runs = _runs(settings)
    swept = named_runs(runs)
    sections, notes = [], []
    if len(swept) >= FEWEST_RUNS:
        sections.append(runs_section({one.name: headline(one.results) for one in swept}))
        sections.append(_seeds(settings, runs))
    sections += [_factor(path) for path in _factor_folders(settings)]
    shown = swept if len(swept) <= MOST_RUNS else []
    if len(shown) < len(swept):
        one = command("report", run_dirs=[runs[0].path])
        notes.append(f"{len(swept)} runs are shown together. For one alone, such as the first: {one}")
    pages = []
    with progress(len(shown), "runs") as advance:
        for number, one in enumerate(shown):
            pages.append(_run_page(one.results, one.name, f"run{number}", settings))
            advance(1)
    return Page(*_titles(swept), _made_from(settings, runs), sections, pages, notes)


def _runs(settings: ReportSettings) -> list[RunDir]:
    return find_run_dirs(settings.run_dirs, needs="checkpoints")


def _factor_folders(settings: ReportSettings) -> list[Path]:
    return find_comparison_dirs(settings.factor_dirs or (), parameter="factor_dirs", stem="factor")


def _titles(swept: Sequence[SweptRun]) -> tuple[str, str]:
    if len(swept) == 1:
        config = swept[0].run.config
        seed = "" if config.seed is None else f", seed {config.seed}"
        return (
            f"{config.run_name}{seed}",
            "What emerged in this training run, when, where, in what order, and how sure that is.",
        )
    return f"{len(swept)} runs", "What emerged in these training runs, what repeats, and how sure that is."


def _made_from(settings: ReportSettings, runs: Sequence[RunDir]) -> str:
    """Hashes what a report shows: by the hashes that results have, so that nothing large is read."""
    shown = {"version": __version__} | {name: getattr(settings, name) for name in ("heads", "steps", "example")}
    folders = [settings.comparison_dir] if settings.comparison_dir else []
    compared = [FileHash.of(ComparisonLayout(Path(folder)).comparison).sha256 for folder in folders]
    factors = [FileHash.of(ComparisonLayout(path, "factor").comparison).sha256 for path in _factor_folders(settings)]
    return digest(
        {"shown": shown, "runs": [_hashes(RunResults(run)) for run in runs], "compared": compared, "factors": factors}
    )


def _hashes(results: RunResults) -> list[str]:
    layout = results.run.layout
    files = [layout.sweep, layout.birth_windows, layout.story, layout.importance, *results.intervention_files()]
    return [FileHash.of(path).sha256 if path.is_file() else "none" for path in files] + [str(results.run.complete)]


def _seeds(settings: ReportSettings, runs: Sequence[RunDir]) -> Section:
    """Opens the comparison of the runs, or makes it; says why if they cannot be compared."""
    if settings.comparison_dir is not None:
        layout = ComparisonLayout(Path(settings.comparison_dir))
        document = read_comparison(layout.comparison)
        compared, given = {one.sweep_sha256 for one in document.runs}, _sweeps(runs)
        if compared != given:
            raise unusable(
                layout.comparison, f"the comparison of these {len(runs)} runs as they are", "one of other results"
            )
        document.arrays.check(layout.arrays, recorded_in=layout.comparison, remedy="run kvjax compare-seeds again")
        dataset = read_dataset(layout.arrays, expected="the arrays of a comparison (run kvjax compare-seeds again)")
        return seeds_section(document.model_dump(mode="json"), dataset)
    try:
        made = compare_runs(Runs.of([run.path for run in runs]), CompareSettings())
    except InputError as error:
        return Section("seeds", "Across seeds", "What repeats whatever the seed.", missing=str(error))
    return seeds_section(made.document, made.dataset)


def _sweeps(runs: Sequence[RunDir]) -> set[str | None]:
    return {RunResults(run).sweep.measured_on.sweep_sha256 for run in runs}


def _factor(path: Path) -> Section:
    layout = ComparisonLayout(path, "factor")
    document = read_factor(layout.comparison)
    document.arrays.check(layout.arrays, recorded_in=layout.comparison, remedy="run kvjax factor-screen again")
    expected = "the arrays of a factor (run kvjax factor-screen again)"
    trajectories = {}
    for entry in document.settings:
        if any(run.sweep_sha256 is not None for run in entry.runs):
            trajectories[entry.label] = read_dataset(layout.arrays, group=entry.label, expected=expected)
    return factor_section(document.model_dump(mode="json"), trajectories)


def _run_page(results: RunResults, name: str, anchor: str, settings: ReportSettings) -> RunPage:
    pairs, attention, reason = {}, None, None
    try:
        results.check_tables()  # which heads and steps are chosen from
        opened = OpenedRun(results.run, Benchmark.open(results.run.benchmark_dir(settings.benchmark_dir)))
        probe = open_probe_set(results.run.layout.probe_set, opened.benchmark)
    except InputError as error:
        reason = str(error)
    else:
        pairs = _pairs(probe, opened.benchmark)
        heads, steps = _chosen_heads(results, settings), _chosen_steps(results, settings)
        check_chosen(results, heads, probe, settings.example)
        try:
            attention = attention_patterns(opened, steps, heads, probe.records[settings.example])
        except InputError as error:
            reason = str(error)
    return run_page(results, anchor=anchor, title=name, pairs=pairs, attention=attention, why_no_attention=reason)


def check_chosen(results: RunResults, heads: Sequence[Component], probe: ProbeSet, example: int) -> None:
    """Refuses heads and streams that there are none of.

    Raises:
      InputError: a head is none of the run's, or the probe set has fewer streams.
    """
    layers, count = (results.metrics.sizes[name] for name in ("layer", "head"))
    for one in heads:
        if one.is_mlp or one.layer >= layers or one.head >= count:
            raise bad_argument("heads", f"heads of {layers} layers with {count} each, such as L0H0", one)
    if example >= len(probe.records):
        raise bad_argument("example", f"a number below {len(probe.records)}, the streams of the probe set", example)


def _pairs(probe: ProbeSet, benchmark: Benchmark) -> Mapping[str, StreamPair]:
    try:
        return {pair.pair_id: pair for pair in open_pairs(probe, benchmark).pairs}
    except InputError:
        return {}  # a map of positions then shows their numbers alone


def attention_patterns(
    opened: OpenedRun, steps: Sequence[int], heads: Sequence[Component], record: Record
) -> AttentionPatterns:
    """Computes the attention of heads on a stream.

    Args:
      opened: the run.
      steps: of its checkpoints.
      heads: of its layers.
      record: whose tokens the heads look at.

    Raises:
      InputError: a checkpoint cannot be used.
    """
    tokens = opened.encode([record["tokens"]])
    layers, numbers = jnp.array([one.layer for one in heads]), jnp.array([one.head for one in heads])

    def patterns(params: Any, config: Any, tokens_1xT: Any) -> Any:
        _, trace = plain_forward(config)(params, tokens_1xT, capture=("pattern",))
        return trace["pattern"][layers, 0, numbers]

    measured = opened.measure(patterns, tokens, steps=list(steps))
    sample = f"{record['sample_id']} ({record['split']})"
    return AttentionPatterns(record["tokens"], sample, list(map(str, heads)), steps, np.asarray(measured))


def _chosen_steps(results: RunResults, settings: ReportSettings) -> list[int]:
    """Chooses the measured steps that were asked for, or those at which most changes.

    Raises:
      InputError: none of those that were asked for was measured.
    """
    swept = [row["step"] for row in results.rows]
    if settings.steps is None:
        return [swept[row] for row in rows_of_change(results.rows, most=_MOST_ATTENTION_STEPS)]
    chosen = [step for step in results.run.select_steps(settings.steps) if step in swept]
    if not chosen:
        raise bad_argument("steps", "steps that were measured (run kvjax checkpoint-sweep)", settings.steps)
    return chosen


def _chosen_heads(results: RunResults, settings: ReportSettings) -> list[Component]:
    """Chooses the heads that were asked for, or those whose ablation costs most at any checkpoint."""
    if settings.heads is not None:
        return [Component.parse(name, "heads") for name in settings.heads]
    leaders: dict[Component, float] = {}
    for row in results.rows:
        for own in row["top_heads"]:
            drop = own[drop_field("accuracy", row["ranked_by"])]
            head = Component(own["layer"], own["head"])
            leaders[head] = max(leaders.get(head, -np.inf), -np.inf if drop is None else drop)
    return sorted(sorted(leaders, key=leaders.get, reverse=True)[:_ATTENTION_HEADS], key=str)
