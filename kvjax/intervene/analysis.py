"""Intervenes in a run's birth windows, as planned, and writes `analysis/interventions/`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.artifacts.files import replace_together, write_json, write_json_lines
from kvjax.artifacts.identity import Identity, sealed
from kvjax.artifacts.layout import arrays_beside
from kvjax.artifacts.provenance import software_versions
from kvjax.artifacts.recovery_tables import PATCHING
from kvjax.artifacts.results import Intervention, RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.tables import SCHEMA_VERSION, write_datasets
from kvjax.devices import backend, device_count, device_description
from kvjax.errors import InputError
from kvjax.execution.memory_plan import CPU_TOKENS_PER_BATCH as RECORD_TOKENS_PER_BATCH
from kvjax.intervene.component_tables import write_component_tables
from kvjax.intervene.inputs import CPU_TOKENS_PER_BATCH, InterventionInputs, Outcome
from kvjax.intervene.kinds import find_kind
from kvjax.intervene.kinds.kind import Kind
from kvjax.intervene.plan import InterventionPlan, Task, Window, window_hashes
from kvjax.intervene.recovery import PairGroups
from kvjax.intervene.settings import InterventionSettings
from kvjax.model.checkpoint import CheckpointSource
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import stack_params
from kvjax.task.corruption import PAIR_KINDS
from kvjax.task.encoding import EncodedRecords
from kvjax.task.pair_encoding import EncodedPairs, encode_clean_streams, encode_pairs


@dataclasses.dataclass(frozen=True)
class InterventionReport:
    """The result of one kind of intervention in one window; `reused` if an earlier call measured it."""

    run: RunDir
    kind: str
    window: str
    path: Path
    document: dict[str, Any]
    reused: bool = False


class _Pairs:
    """The pairs of a plan, as arrays, and grouped; each is made once it is asked for."""

    def __init__(self, plan: InterventionPlan, pairs_per_kind: int | None):
        self.pairs = tuple(pair for kind in PAIR_KINDS for pair in plan.pair_set.of_kind(kind)[:pairs_per_kind])
        self.vocabulary = plan.inputs.benchmark.vocabulary
        self.longest = plan.inputs.run.config.model.max_seq_len

    @functools.cached_property
    def encoded(self) -> EncodedPairs:
        return encode_pairs(self.pairs, self.vocabulary, max_seq_len=self.longest)

    @functools.cached_property
    def clean(self) -> tuple[EncodedRecords, np.ndarray]:
        return encode_clean_streams(self.pairs, self.vocabulary, max_seq_len=self.longest)

    @functools.cached_property
    def groups(self) -> PairGroups:
        return PairGroups.of(self.encoded)


@dataclasses.dataclass(frozen=True)
class _LoadedWindow:
    """A window's checkpoints and pairs, as kinds of intervention take them, and the hashes of the files by step."""

    inputs: InterventionInputs
    hashes: Mapping[int, str]


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
    run, reports = plan.inputs.run, []
    pairs = _Pairs(plan, settings.pairs_per_kind)
    for window, tasks in plan.by_window():
        # Loading a file hashes it. Files are read to be hashed alone only if every summary may be current.
        missing = any(task.earlier is None for task in tasks)
        loaded = _load(plan, source, window, pairs, settings) if missing else None
        hashes = loaded.hashes if loaded else window_hashes(run, window)
        for task in tasks:
            kind, measured = find_kind(task.kind), task.is_measured_on(hashes)
            if not measured:
                loaded = loaded or _load(plan, source, window, pairs, settings)
                hashes = loaded.hashes
                outcome = kind.analyse(loaded.inputs)
            stored = plan.stored_results(task, hashes)
            reused = measured and task.has_read(stored)
            if reused:
                reports.append(_reuse(run, task, kind, settings.metric))
            else:
                if kind.beside is not None:
                    own = Intervention.open(task.path).dataset if measured else outcome.dataset
                    others = {name: result.dataset for name, result in stored.items()}
                    outcome = kind.beside(own, others, pairs.groups)
                measured_on = plan.measured_on(task, hashes, stored)
                reports.append(_publish(plan, task, pairs, measured_on, outcome, settings))
            if kind.neuron_rows and not (reused and run.layout.neurons.is_file()):
                write_json_lines(run.layout.neurons, _all_neuron_rows(run, kind))
            advance(1)
    if any(task.kind == PATCHING for task in plan.tasks):
        write_component_tables(run, settings.metric)
    return reports


def _reuse(run: RunDir, task: Task, kind: Kind, metric: str) -> InterventionReport:
    """Reports an earlier result; if its summary is of another metric, summarises its arrays anew."""
    document = task.earlier
    if kind.summarise and document.get("metric", metric) != metric:
        document = sealed(document | kind.summarise(Intervention.open(task.path).dataset, metric))
        write_json(task.path, document)
    return InterventionReport(run, task.kind, task.window.name, task.path, document, reused=True)


def _load(
    plan: InterventionPlan, source: CheckpointSource, window: Window, pairs: _Pairs, settings: InterventionSettings
) -> _LoadedWindow:
    """Loads a window's checkpoints, each file read once."""
    inputs, run, vocabulary = plan.inputs, plan.inputs.run, pairs.vocabulary
    checkpoints = {step: source.load(run.checkpoints[step], step) for step in window.steps}
    # Now, so that an interrupted call keeps them. If the store cannot be written, they are converted again next time.
    with contextlib.suppress(InputError):
        source.save()
    stacked = stack_params([checkpoint.params for checkpoint in checkpoints.values()])
    config = DecoderConfig.from_model_config(
        run.config.model,
        len(vocabulary.tokens),
        precision=settings.precision,
        tied="unembedding" not in stacked,
    )
    clean, clean_rows = pairs.clean
    on_cpu = backend() == "cpu"
    of_window = InterventionInputs(
        config=config,
        vocabulary=vocabulary,
        steps=window.steps,
        stacked=stacked,
        encoded=pairs.encoded,
        pair_ids=tuple(pair.pair_id for pair in pairs.pairs),
        clean=clean,
        clean_rows=clean_rows,
        fit=inputs.fit,
        records=inputs.encoded,
        components=plan.components,
        devices=device_count(),
        tokens_per_batch=CPU_TOKENS_PER_BATCH if on_cpu else inputs.encoded.tokens.size,
        record_tokens_per_batch=RECORD_TOKENS_PER_BATCH if on_cpu else inputs.encoded.tokens.size,
        metric=settings.metric,
        rank_by=settings.rank_by,
    )
    return _LoadedWindow(of_window, {step: checkpoint.sha256 for step, checkpoint in checkpoints.items()})


def _publish(
    plan: InterventionPlan,
    task: Task,
    pairs: _Pairs,
    measured_on: Identity,
    outcome: Outcome,
    settings: InterventionSettings,
) -> InterventionReport:
    run, window, kind, pair_set, groups = plan.inputs.run, task.window, task.kind, plan.pair_set, pairs.groups
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
        "measured_on": measured_on.document,
        "device": device_description(),
        "versions": software_versions(),
    }
    dataset = outcome.dataset
    dataset.attrs |= run.config.attributes | {"kind": kind}
    dataset.attrs["measured_on_sha256"] = measured_on.sha256
    with replace_together() as files:
        write_datasets(arrays_beside(task.path), [(None, dataset)], replace=files.file)
        document["arrays"] = dataclasses.asdict(files.hash(arrays_beside(task.path)))
        document = sealed(document)
        write_json(task.path, document, replace=files.file)
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
