"""Intervenes in a run's birth windows, from run directory to `analysis/interventions/`."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvjax.artifacts.birth_windows_schema import read_birth_windows
from kvjax.artifacts.files import FileHash, file_sha256, read_json, write_json, write_json_lines
from kvjax.artifacts.identity import Identity
from kvjax.artifacts.layout import arrays_beside
from kvjax.artifacts.provenance import software_versions
from kvjax.artifacts.results import Intervention, RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.tables import SCHEMA_VERSION, write_datasets
from kvjax.devices import backend, device_count, device_description
from kvjax.errors import InputError, bad_argument, unusable
from kvjax.execution.inputs import RunInputs
from kvjax.execution.memory_plan import CPU_TOKENS_PER_BATCH as RECORD_TOKENS_PER_BATCH
from kvjax.intervene.inputs import CPU_TOKENS_PER_BATCH, InterventionInputs, Outcome
from kvjax.intervene.kinds import find_kind
from kvjax.intervene.kinds.kind import Kind
from kvjax.intervene.settings import InterventionSettings
from kvjax.model.checkpoint import CheckpointSource
from kvjax.model.components import Component, all_components
from kvjax.model.decoder import DecoderConfig, stack_params
from kvjax.task.corruption import PAIR_KINDS
from kvjax.task.pair_encoding import encode_clean_streams, encode_pairs
from kvjax.task.pairs import PairSet, own_pairs

# Raised whenever a number of an intervention or a name in its files changes, so that older ones are measured anew.
INTERVENTION_VERSION = 2


@dataclasses.dataclass(frozen=True)
class InterventionReport:
    """The result of one kind of intervention in one window; `reused` if an earlier call measured it."""

    run: RunDir
    kind: str
    window: str
    path: Path
    document: dict[str, Any]
    reused: bool = False


@dataclasses.dataclass(frozen=True)
class Window:
    """Some checkpoints of a run, and the name of the files about them."""

    name: str
    description: dict[str, Any]
    steps: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """One kind of intervention in one window.

    Attributes:
      window, kind: which.
      path: where its summary lies, or will.
      measured_on: what its numbers depend on.
      earlier: the earlier summary of exactly that; None if it has to be measured.
    """

    window: Window
    kind: str
    path: Path
    measured_on: Identity
    earlier: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class InterventionPlan:
    """The kinds to measure in each window of one run, and the results that are there already.

    Attributes:
      work: the run with its benchmark and probe set.
      pair_set: the pairs.
      hashes: step -> SHA-256 of the checkpoint's file.
      tasks: window by window.
    """

    work: RunInputs
    pair_set: PairSet
    hashes: Mapping[int, str]
    tasks: tuple[Task, ...]


def plan_interventions(work: RunInputs, windows: Sequence[Window], settings: InterventionSettings) -> InterventionPlan:
    """Says which kinds are to be measured in which windows of a run, so that a refusal comes before any measurement.

    Raises:
      InputError: a name is unknown, or something was measured before with other settings.
    """
    named = _named_components(work.run, settings)
    pair_set = own_pairs(work.probe, work.benchmark)
    hashes = {step: file_sha256(work.run.checkpoints[step]) for window in windows for step in window.steps}

    def task(window: Window, kind: str) -> Task:
        chosen = {
            "pairs_per_kind": settings.pairs_per_kind,
            "precision": settings.precision,
            "probe_set": work.probe.manifest.content_sha256[:12],
        }
        if find_kind(kind).takes_components:
            chosen["components"] = None if named is None else list(map(str, named))
        inputs = {
            "intervention_version": INTERVENTION_VERSION,
            "window": window.description,
            "checkpoints": {str(step): hashes[step] for step in window.steps},
            "pairs_sha256": pair_set.manifest.content_sha256,
            "probe_set_sha256": work.probe.manifest.content_sha256,
            "fit_sha256": work.probe.manifest.fit_sha256,
        }
        path = work.run.layout.intervention(kind, window.name)
        measured_on = Identity(chosen, inputs)
        return Task(window, kind, path, measured_on, _find_earlier(path, measured_on, settings))

    return InterventionPlan(
        work, pair_set, hashes, tuple(task(window, kind) for window in windows for kind in settings.kinds)
    )


def _find_earlier(path: Path, wanted: Identity, settings: InterventionSettings) -> dict[str, Any] | None:
    """Reads the summary at `path` if it and its arrays are current; returns None if they have to be measured.

    Raises:
      InputError: it was measured with other settings, or does not say with which, and may not be replaced.
    """
    try:
        document = read_json(path)
    except InputError:
        return None  # missing or damaged
    if not isinstance(document, dict):
        return None
    if wanted.decide(document.get("measured_on", {}), path, overwrite=settings.overwrite) == "redo":
        return None
    try:
        Intervention.open(path).check_arrays()
    except InputError:
        return None
    return document


def intervene_in_run(
    plan: InterventionPlan,
    source: CheckpointSource,
    settings: InterventionSettings,
    *,
    advance: Callable[[int], None],
) -> list[InterventionReport]:
    """Measures the planned kinds in a run, writes their results, and reports them and the earlier ones.

    Args:
      plan: the run, and what to do.
      source: where its checkpoints come from.
      settings: how.
      advance: called with the number of (window, kind) done.

    Raises:
      InputError: a checkpoint cannot be used, or a result not be written. What was written before stays, and is found
        by the next plan: a later call measures only the rest.
    """
    run, reports = plan.work.run, []
    neuron_table = run.layout.neurons
    for window, tasks in itertools.groupby(plan.tasks, key=lambda task: task.window):
        inputs = None
        for task in tasks:
            kind = find_kind(task.kind)
            if task.earlier is None:
                inputs = inputs or _inputs(plan, source, window, settings)
                reports.append(_publish(plan, task, inputs, kind.analyse(inputs), settings))
            else:
                report = InterventionReport(run, task.kind, window.name, task.path, task.earlier, reused=True)
                reports.append(report)
            if kind.neuron_rows and (task.earlier is None or not neuron_table.is_file()):
                write_json_lines(neuron_table, _all_neuron_rows(run, kind))
            advance(1)
    return reports


def chosen_windows(run: RunDir, settings: InterventionSettings) -> list[Window]:
    """Finds the windows, or the named steps, to intervene in.

    Raises:
      InputError: there is no such window or step.
    """
    if settings.steps is not None:
        steps = tuple(run.select_steps(settings.steps))
        return [Window(_steps_name(run, steps), {"steps": list(steps)}, steps)]
    path = run.layout.birth_windows
    if not path.is_file():
        raise unusable(path, "birth windows (run kvjax birth-windows, or name `steps`)", "no such file")
    found = read_birth_windows(path) if settings.force else RunResults(run).windows
    windows = []
    for entry in found.windows:
        if settings.window in ("all", str(entry.center_step)):
            bounds = {"start_step": entry.start_step, "center_step": entry.center_step, "end_step": entry.end_step}
            missing = [step for step in entry.steps if step not in run.checkpoints]
            if missing:
                raise unusable(run.layout.checkpoints, f"the window's checkpoint {missing[0]}", run.describe_steps())
            windows.append(Window(f"window_{entry.center_step}", bounds | {"steps": entry.steps}, tuple(entry.steps)))
    if not windows:
        centers = ", ".join(str(entry.center_step) for entry in found.windows) or f"none ({found.verdict})"
        expected = "a window (or `steps`)" if settings.window == "all" else f"a window around {settings.window}"
        raise unusable(path, expected, f"windows around: {centers}")
    return windows


def _named_components(run: RunDir, settings: InterventionSettings) -> tuple[Component, ...] | None:
    """Reads the named set, in forward order and each once; raises `InputError` if the model lacks one of them."""
    if settings.components is None:
        return None
    components = all_components(run.config.model.n_layers, run.config.model.n_heads)
    named = [Component.parse(spelling, "components") for spelling in settings.components]
    for component in named:
        if component not in components:
            raise bad_argument("components", f"components among {', '.join(map(str, components))}", component)
    return tuple(component for component in components if component in named)


def _steps_name(run: RunDir, steps: tuple[int, ...]) -> str:
    """Names the files about some steps: by the ends of a whole stretch of the run, or by every step."""
    stretch = tuple(step for step in run.checkpoints if steps[0] <= step <= steps[-1])
    if len(steps) == 1 or stretch == steps:
        return "_".join(["steps", *dict.fromkeys(map(str, (steps[0], steps[-1])))])
    every = "-".join(map(str, steps))
    return f"steps_{every if len(every) < 60 else hashlib.sha256(every.encode()).hexdigest()[:12]}"


def _inputs(
    plan: InterventionPlan, source: CheckpointSource, window: Window, settings: InterventionSettings
) -> InterventionInputs:
    """Loads a window's checkpoints and encodes the pairs."""
    work, run, vocabulary = plan.work, plan.work.run, plan.work.benchmark.vocabulary
    pairs = [pair for kind in PAIR_KINDS for pair in plan.pair_set.of_kind(kind)[: settings.pairs_per_kind]]
    params = []
    for step in window.steps:
        loaded = source.load(run.checkpoints[step], step)
        if loaded.sha256 != plan.hashes[step]:
            raise unusable(run.checkpoints[step], "a file that stays as it is", "it changed while it was read")
        params.append(loaded.params)
    # Now, so that an interrupted call keeps them. If the store cannot be written, they are converted again next time.
    with contextlib.suppress(InputError):
        source.save()
    stacked = stack_params(params)
    config = DecoderConfig.from_model_config(
        run.config.model,
        len(vocabulary.tokens),
        precision=settings.precision,
        tied="unembedding" not in stacked,
    )
    longest = run.config.model.max_seq_len
    clean, clean_rows = encode_clean_streams(pairs, vocabulary, max_seq_len=longest)
    on_cpu = backend() == "cpu"
    return InterventionInputs(
        config=config,
        vocabulary=vocabulary,
        steps=window.steps,
        stacked=stacked,
        encoded=encode_pairs(pairs, vocabulary, max_seq_len=longest),
        pair_ids=tuple(pair.pair_id for pair in pairs),
        clean=clean,
        clean_rows=clean_rows,
        fit=work.fit,
        records=work.encoded,
        components=_named_components(run, settings),
        devices=device_count(),
        tokens_per_batch=CPU_TOKENS_PER_BATCH if on_cpu else work.encoded.tokens.size,
        record_tokens_per_batch=RECORD_TOKENS_PER_BATCH if on_cpu else work.encoded.tokens.size,
    )


def _publish(
    plan: InterventionPlan, task: Task, inputs: InterventionInputs, outcome: Outcome, settings: InterventionSettings
) -> InterventionReport:
    run, window, kind, pair_set = plan.work.run, task.window, task.kind, plan.pair_set
    groups = inputs.groups
    document = {
        "schema_version": SCHEMA_VERSION,
        "run_name": run.config.run_name,
        "kind": kind,
        "window": window.description,
        "steps": list(window.steps),
        "pairs": {
            "content_sha256": pair_set.manifest.content_sha256,
            "probe_set_sha256": pair_set.manifest.probe_set_sha256,
            "counts": {name: len(own) for name, own in groups.members.items()},
            "affected_reads": {name: int(groups.reads_N[own].sum()) for name, own in groups.members.items()},
        },
        **outcome.summary,
        "precision": settings.precision,
        "forced": settings.force,
        "measured_on": task.measured_on.document,
        "device": device_description(),
        "versions": software_versions(),
    }
    dataset = outcome.dataset
    dataset.attrs |= {"run_name": run.config.run_name, "seed": run.config.seed, "kind": kind}
    dataset.attrs["measured_on_sha256"] = task.measured_on.sha256
    write_datasets(arrays_beside(task.path), [(None, dataset)])
    document["arrays"] = dataclasses.asdict(FileHash.of(arrays_beside(task.path)))
    write_json(task.path, document)
    return InterventionReport(run, kind, window.name, task.path, document)


def _all_neuron_rows(run: RunDir, kind: Kind) -> list[dict[str, Any]]:
    """Collects the neurons of every window measured so far, each step once, by its newest measurement."""
    rows: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(RunResults(run).intervention_files(kind.name), key=lambda path: path.stat().st_mtime_ns):
        own: dict[int, list[dict[str, Any]]] = {}
        try:
            dataset = Intervention.open(path).dataset
        except InputError:
            continue  # damaged, or of an older version: measured again when its window is asked for
        for row in kind.neuron_rows(dataset):
            own.setdefault(row["step"], []).append(row)
        rows |= own
    return [row for step in sorted(rows) for row in rows[step]]
