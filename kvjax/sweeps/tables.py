"""The tables of a sweep, from what was measured to files: labelled means, intervals, rows, provenance."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from kvjax.artifacts.files import Replacements, replace_together
from kvjax.artifacts.provenance import software_versions
from kvjax.artifacts.results import hash_tables
from kvjax.artifacts.stored_rows import StoredRows
from kvjax.artifacts.sweep_schema import Sweep, TrajectoryBreak, write_sweep
from kvjax.artifacts.tables import SCHEMA_VERSION, DatasetsFile, datasets_file, row_schema, rows_file
from kvjax.devices import device_description
from kvjax.execution.inputs import RunInputs
from kvjax.machine import return_free_memory
from kvjax.sweeps.blocks import blocks, spans
from kvjax.sweeps.continuity import embedding_drift, trajectory_breaks
from kvjax.sweeps.current_tables import drawn_from
from kvjax.sweeps.dataset import build_dataset, build_events
from kvjax.sweeps.intervals import build_intervals
from kvjax.sweeps.probe_index import ProbeIndex
from kvjax.sweeps.results import MeasuredRun, SweepLog, SweepReport
from kvjax.sweeps.rows import checkpoint_rows, head_rows, mlp_rows, stabilized_from, stable_checkpoints
from kvjax.sweeps.settings import SweepSettings
from kvjax.sweeps.vouching import vouched_by, vouching_notes
from kvjax.task.probe_set import install_probe_set


def publish(
    inputs: RunInputs, identity: Mapping[str, Any], measured: MeasuredRun, settings: SweepSettings, log: SweepLog
) -> SweepReport:
    """Writes the tables of everything measured on a run so far, all together.

    Args:
      inputs: the run.
      identity: what its results depend on beside checkpoint files.
      measured: what the tables are made from.
      settings: the sweep's settings.
      log: what happened.

    Raises:
      InputError: a table cannot be written.
    """
    run = inputs.run
    if not measured.checkpoints:
        return SweepReport(run, [], log, [])
    install_probe_set(inputs.probe, run.layout.probe_set)
    results, reference = [result for _, result in measured.checkpoints], measured.reference and measured.reference[1]
    sources = drawn_from(inputs, identity, settings)  # as they are before they are read
    with replace_together() as files:
        breaks = _write_tables(inputs, measured, settings, files)
        vouched = vouched_by(results, reference)
        notes = list(dict.fromkeys(note for result in results for note in result.info["notes"]))
        notes += _notes(inputs, log, reference_used=reference is not None)
        notes += [found.reason for found in breaks]
        unvouched = log.unvouched or "no checkpoint was compared with a recorded accuracy when it was measured"
        notes += vouching_notes(vouched, unvouched)
        document = Sweep.model_validate(
            {
                "schema_version": SCHEMA_VERSION,
                "run_name": run.config.run_name,
                "identity": dict(identity),
                "benchmark": {
                    "name": inputs.benchmark.name,
                    "sha256": inputs.benchmark.sha256,
                    "path": str(inputs.benchmark.path.resolve()),
                },
                "probe_set": {
                    "file": run.layout.probe_set.name,
                    "given_as": str(inputs.probe.path),
                    "content_sha256": inputs.probe.manifest.content_sha256,
                    "fit_sha256": inputs.probe.manifest.fit_sha256,
                    "num_records": len(inputs.probe.records),
                },
                "precision": settings.precision,
                "ranked_by": settings.ranked_by,
                "reference": inputs.reference,
                "reference_given": inputs.reference_given,
                "checkpoints": [{"step": result.step, **result.info} for result in results],
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
                "vouched": vouched,
                "breaks": breaks,
                "tables": hash_tables(run, files),
                "converted": run.layout.converted.is_dir(),
                "drawn_from": sources,
            }
        )
        write_sweep(run.layout.sweep, document, replace=files.file)
    return SweepReport(run, StoredRows(run.layout.rows), log, notes, vouched)


@dataclasses.dataclass(frozen=True)
class _OverTheRun:
    """What a row needs to know of other checkpoints: breaks between them, and from which on the run stays stable."""

    breaks: Sequence[TrajectoryBreak]
    stabilized: Sequence[Mapping[str, bool | None]]


def _write_tables(
    inputs: RunInputs, measured: MeasuredRun, settings: SweepSettings, files: Replacements
) -> list[TrajectoryBreak]:
    """Writes the arrays of one block of checkpoints after another, then the rows of each from what was written."""
    layout = inputs.run.layout
    parts = spans(len(measured.checkpoints))
    with datasets_file(layout.arrays, along="step", parts=len(parts), replace=files.file) as arrays:
        found = _write_arrays(inputs, measured, settings, arrays)
        with contextlib.ExitStack() as held:
            writers = {  # closed, and so put in place, in the reverse order
                table: held.enter_context(rows_file(path, row_schema(table), replace=files.file))
                for table, path in (("mlps", layout.mlps), ("heads", layout.heads), ("checkpoint", layout.rows))
            }
            for begin, end, before in parts:
                if begin:  # not for every short run: it costs 20 ms
                    return_free_memory()
                dataset, intervals = arrays.read(begin, end, None, "intervals")
                for table, rows in _rows(inputs, found, dataset, intervals, begin=begin, before=before):
                    writers[table](rows)
    return list(found.breaks)


def _write_arrays(
    inputs: RunInputs, measured: MeasuredRun, settings: SweepSettings, arrays: DatasetsFile
) -> _OverTheRun:
    run, probe = inputs.run, inputs.probe
    index = ProbeIndex.of(probe.records, inputs.encoded, probe.manifest.splits, probe.manifest.difficulty)
    reference = measured.reference and measured.sums(measured.reference)
    attributes = run.config.attributes | {
        "benchmark_sha256": inputs.benchmark.sha256,
        "probe_set_sha256": probe.manifest.content_sha256,
        "num_values": len(inputs.benchmark.vocabulary.value_tokens),
    }
    first, resampled, digests, drifts, stable = None, {}, [], [], []
    limits = run.config.evaluation.stabilization
    for block in blocks(measured):
        if block.before:
            return_free_memory()
        shared = (block.arrays, block.steps, index)
        dataset = build_dataset(
            *shared,
            reference=reference,
            weights=block.weights,
            first=first,
            ranked_by=settings.ranked_by,
            moved=block.moved,
            logistic=block.logistic,
        )
        dataset.attrs |= attributes
        new = {name: x[block.before :] for name, x in block.arrays.items()}
        intervals = build_intervals(new, block.steps[block.before :], index, before=resampled)
        events = build_events(*shared, competitors=measured.margins.competitors_NxQ)
        arrays.append([(None, block.own(dataset)), ("intervals", intervals), ("events", block.own(events))])
        first = first or {"weights/squared_norm": block.arrays["weights/squared_norm"][0]}
        digests.append(block.arrays["weights/digest"][block.before :])
        drifts.append(embedding_drift(dataset)[block.before :])
        stable.append({family: of[block.before :] for family, of in stable_checkpoints(dataset, limits).items()})
    steps = [result.step for _, result in measured.checkpoints]
    breaks = trajectory_breaks(run, steps, np.concatenate(digests), np.concatenate(drifts))
    stabilized = stabilized_from({family: np.concatenate([of[family] for of in stable]) for family in stable[0]})
    # What lasts until the last checkpoint is known once every checkpoint up to it is in the table.
    if steps != list(run.checkpoints):
        stabilized = [dict.fromkeys(families) for families in stabilized]
    return _OverTheRun(breaks, stabilized)


def _rows(
    inputs: RunInputs, found: _OverTheRun, dataset: xr.Dataset, intervals: xr.Dataset, *, begin: int, before: int
) -> Iterator[tuple[str, Sequence[dict[str, Any]]]]:
    """Yields every table with the rows of a block of checkpoints, which begins at a place among all."""
    config = inputs.run.config
    count = dataset.sizes["step"]
    rows = checkpoint_rows(
        dataset,
        intervals,
        run_name=config.run_name,
        seed=config.seed,
        thresholds=config.evaluation.birth_thresholds,
        stabilized=found.stabilized[begin : begin + count],
        provisional=not inputs.run.complete,
        breaks=found.breaks,
    )
    yield "checkpoint", rows[before:]
    for table, components in (("heads", head_rows(dataset, intervals)), ("mlps", mlp_rows(dataset, intervals))):
        yield table, components[before * len(components) // count :]


def _notes(inputs: RunInputs, log: SweepLog, *, reference_used: bool) -> list[str]:
    """Writes why fields are empty, provisional or not kept."""
    run, notes = inputs.run, []
    reached = f"{max(run.checkpoints)} of {run.planned_steps} steps"
    if log.not_kept is not None:
        notes.append(f"converted parameters are not kept: {log.not_kept}")
    if inputs.reference is not None and not reference_used:
        notes.append(f"drift to the reference is null: {inputs.reference} could not be used")
    if inputs.reference is None:
        notes.append(
            f"drift to the final checkpoint is null: the run has checkpoints up to {reached}, and is still followed"
        )
    elif not run.complete:
        what = "drift to the reference and `stabilized` are" if inputs.reference_given == "final" else "`stabilized` is"
        notes.append(f"{what} provisional, to the last checkpoint of an unfinished run: it has reached {reached}")
    return notes
