"""The tables of a sweep, from measured arrays to files: labelled means, intervals, rows, provenance."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from kvjax.artifacts.files import write_json
from kvjax.artifacts.provenance import device_description, software_versions
from kvjax.artifacts.results import CheckpointResult, ResultStore
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.tables import (
    SCHEMA_VERSION,
    CheckpointRow,
    HeadRow,
    MlpRow,
    write_datasets,
    write_rows,
)
from kvjax.sweeps.dataset import build_dataset, build_events
from kvjax.sweeps.intervals import build_intervals
from kvjax.sweeps.logistic import measure_logistic
from kvjax.sweeps.means import ProbeIndex
from kvjax.sweeps.movement import measure_movement
from kvjax.sweeps.prepared import BEST, PreparedRun, result_name
from kvjax.sweeps.rows import checkpoint_rows, head_rows, mlp_rows
from kvjax.sweeps.stream import CheckpointSource, ProbeProgram, SweepLog, SweepSettings
from kvjax.task.probe_set import install_probe_set


@dataclasses.dataclass(frozen=True)
class SweepReport:
    """What a sweep of one run left behind.

    Attributes:
      run: the run.
      rows: the rows of `checkpoint_metrics.jsonl`; none, and no tables, where no checkpoint could be used.
      log: what was measured, reused and refused.
      notes: sentences a reader should know, such as why a field is empty.
      dataset: every mean, labelled; None where there are no rows.
      intervals: of the means that have them, labelled likewise.
    """

    run: RunDir
    rows: list[dict[str, Any]]
    log: SweepLog
    notes: list[str]
    dataset: xr.Dataset | None = None
    intervals: xr.Dataset | None = None


def publish(
    work: PreparedRun,
    identity: Mapping[str, Any],
    results: Mapping[str, CheckpointResult],
    program: ProbeProgram,
    store: ResultStore,
    source: CheckpointSource,
    settings: SweepSettings,
    log: SweepLog,
) -> SweepReport:
    """Writes the tables of everything measured on a run so far, each file replaced whole, and returns them.

    Args:
      work: the run.
      identity: what its results depend on beside checkpoint files.
      results: what this sweep measured or found measured, by name.
      program: what measured it.
      store: where results are kept, those of other steps too.
      source: where checkpoints come from.
      settings: the sweep's settings.
      log: what happened.
    """
    run, results = work.run, dict(results)
    for step, path in run.checkpoints.items():
        # Steps measured earlier stay in the tables whatever `--steps` this sweep was given.
        name = result_name(step)
        if name not in work.wanted and (earlier := store.load(name, path)) is not None:
            results[name] = earlier
    tabled = {name: result for name, result in sorted(results.items(), key=lambda item: item[1].step) if name != BEST}
    if not tabled:
        return SweepReport(run, [], log, [])
    install_probe_set(work.probe, run.analysis)
    steps = [result.step for result in tabled.values()]
    names = next(iter(tabled.values())).arrays
    arrays = {name: np.stack([result.arrays[name] for result in tabled.values()]) for name in names}
    reference = results.get(work.reference) if work.reference else None
    files = {result_name(step): (step, path) for step, path in run.checkpoints.items()} | dict(work.wanted)
    moved = None
    if settings.event_drift:
        named = (work.reference, reference) if reference else None
        moved = measure_movement(list(tabled.items()), named, files, program, store, source)
    logistic: list[Mapping[str, np.ndarray] | None] = []
    if settings.probe != "none":
        asked = settings.probe == "logistic"
        found = measure_logistic(tabled, lambda name: asked and name in work.named, files, program, store, source)
        logistic = [found.get(name) for name in tabled]
    index = ProbeIndex.of(work.probe.records, work.encoded, work.probe.manifest.splits, work.probe.manifest.difficulty)
    dataset = build_dataset(
        arrays, steps, index, reference=reference and reference.arrays, moved=moved, logistic=logistic
    )
    intervals = build_intervals(arrays, steps, index)
    dataset.attrs |= {"run_name": run.config.run_name, "seed": run.config.seed}
    rows = checkpoint_rows(
        dataset,
        run_name=run.config.run_name,
        seed=run.config.seed,
        thresholds=run.config.evaluation.birth_thresholds,
        # What lasts until the run's end is known once every checkpoint up to it is in the table.
        stabilization=run.config.evaluation.stabilization if run.complete and steps == list(run.checkpoints) else None,
    )
    write_rows(run.analysis / "checkpoint_metrics.jsonl", rows, CheckpointRow)
    candidates = run.analysis / "component_candidates"
    write_rows(candidates / "heads.jsonl", head_rows(dataset), HeadRow)
    write_rows(candidates / "mlps.jsonl", mlp_rows(dataset), MlpRow)
    groups: list[tuple[str | None, xr.Dataset]] = [
        (None, dataset),
        ("intervals", intervals),
        ("events", build_events(arrays, steps, index)),
    ]
    write_datasets(run.analysis / "checkpoint_metrics.nc", groups)
    notes = list(dict.fromkeys(note for result in tabled.values() for note in result.info["notes"]))
    if work.reference is not None and reference is None:
        notes.append(f"drift to the reference is null: {work.reference} could not be used")
    if work.reference is None:
        notes.append(
            f"drift to the final checkpoint is null: the run has checkpoints up to {max(run.checkpoints)} of "
            f"{run.config.last_checkpoint_step()} steps (name another with --reference)"
        )
    write_json(
        run.analysis / "sweep.json",
        {
            "schema_version": SCHEMA_VERSION,
            "run_name": run.config.run_name,
            "identity": dict(identity),
            "benchmark": {"name": work.benchmark.name, "sha256": work.benchmark.sha256},
            "probe_set": {
                "file": "probe_set.jsonl",
                "given_as": str(work.probe.path),
                "content_sha256": work.probe.manifest.content_sha256,
                "fit_sha256": work.probe.manifest.fit_sha256,
                "num_records": len(work.probe.records),
            },
            "precision": settings.precision,
            "reference": work.reference,
            "checkpoints": [{"step": result.step, **result.info} for result in tabled.values()],
            "refused": log.refused,
            "notes": notes,
            "versions": software_versions(),
            "device": device_description(),
            "timings": {
                "measured": len(log.measured),
                "reused": len(log.reused),
                "first_call_seconds": log.first_call_seconds,
                "later_call_seconds": log.later_call_seconds,
            },
        },
    )
    return SweepReport(run, rows, log, notes, dataset, intervals)
