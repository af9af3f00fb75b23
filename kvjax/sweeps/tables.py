"""The tables of a sweep, from what was measured to files: labelled means, intervals, rows, provenance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from kvjax.artifacts.files import replace_together
from kvjax.artifacts.provenance import software_versions
from kvjax.artifacts.results import hash_tables
from kvjax.artifacts.sweep_schema import Sweep, write_sweep
from kvjax.artifacts.tables import SCHEMA_VERSION, row_schema, write_datasets, write_rows
from kvjax.devices import device_description
from kvjax.execution.inputs import RunInputs
from kvjax.sweeps.continuity import trajectory_breaks
from kvjax.sweeps.dataset import build_dataset, build_events
from kvjax.sweeps.intervals import build_intervals
from kvjax.sweeps.probe_index import ProbeIndex
from kvjax.sweeps.results import MeasuredRun, SweepLog, SweepReport
from kvjax.sweeps.rows import checkpoint_rows, head_rows, mlp_rows
from kvjax.sweeps.settings import SweepSettings
from kvjax.sweeps.vouching import vouched_by, vouching_notes
from kvjax.task.probe_set import install_probe_set


def publish(
    inputs: RunInputs, identity: Mapping[str, Any], measured: MeasuredRun, settings: SweepSettings, log: SweepLog
) -> SweepReport:
    """Writes the tables of everything measured on a run so far, all together, and returns them.

    Args:
      inputs: the run.
      identity: what its results depend on beside checkpoint files.
      measured: what the tables are made from.
      settings: the sweep's settings.
      log: what happened.

    Raises:
      InputError: a table cannot be written.
    """
    run, checkpoints, reference = inputs.run, measured.checkpoints, measured.reference
    if not checkpoints:
        return SweepReport(run, [], log, [])
    install_probe_set(inputs.probe, run.layout.probe_set)
    steps = [result.step for result in checkpoints]
    arrays = {name: np.stack([result.arrays[name] for result in checkpoints]) for name in checkpoints[0].arrays}
    arrays["read/fixed_margin"] = measured.margins.values_CxNxQ
    index = ProbeIndex.of(
        inputs.probe.records, inputs.encoded, inputs.probe.manifest.splits, inputs.probe.manifest.difficulty
    )
    dataset = build_dataset(
        arrays,
        steps,
        index,
        reference=reference and reference.arrays,
        weights=measured.weights,
        ranked_by=settings.ranked_by,
        moved=measured.moved,
        logistic=measured.logistic,
    )
    intervals = build_intervals(arrays, steps, index)
    dataset.attrs |= run.config.attributes
    dataset.attrs |= {
        "benchmark_sha256": inputs.benchmark.sha256,
        "probe_set_sha256": inputs.probe.manifest.content_sha256,
        "num_values": len(inputs.benchmark.vocabulary.value_tokens),
    }
    breaks = trajectory_breaks(run, dataset, arrays)
    rows = checkpoint_rows(
        dataset,
        intervals,
        run_name=run.config.run_name,
        seed=run.config.seed,
        thresholds=run.config.evaluation.birth_thresholds,
        # What lasts until the last checkpoint is known once every checkpoint up to it is in the table.
        stabilization=run.config.evaluation.stabilization if steps == list(run.checkpoints) else None,
        provisional=not run.complete,
        breaks=breaks,
    )
    notes = list(dict.fromkeys(note for result in checkpoints for note in result.info["notes"]))
    if log.not_kept is not None:
        notes.append(f"converted parameters are not kept: {log.not_kept}")
    if inputs.reference is not None and reference is None:
        notes.append(f"drift to the reference is null: {inputs.reference} could not be used")
    if inputs.reference is None:
        notes.append(
            f"drift to the final checkpoint is null: the run has checkpoints up to {max(run.checkpoints)} of "
            f"{run.planned_steps} steps, and is still followed"
        )
    elif not run.complete:
        what = "drift to the reference and `stabilized` are" if inputs.reference_given == "final" else "`stabilized` is"
        notes.append(
            f"{what} provisional, to the last checkpoint of an unfinished run: "
            f"it has reached {max(run.checkpoints)} of {run.planned_steps} steps"
        )
    notes += [found.reason for found in breaks]
    vouched = vouched_by(checkpoints, reference)
    unvouched = log.unvouched or "no checkpoint was compared with a recorded accuracy when it was measured"
    notes += vouching_notes(vouched, unvouched)
    groups: list[tuple[str | None, xr.Dataset]] = [
        (None, dataset),
        ("intervals", intervals),
        ("events", build_events(arrays, steps, index, competitors=measured.margins.competitors_NxQ)),
    ]
    with replace_together() as files:
        write_rows(run.layout.rows, rows, row_schema("checkpoint"), replace=files.file)
        write_rows(run.layout.heads, head_rows(dataset, intervals), row_schema("heads"), replace=files.file)
        write_rows(run.layout.mlps, mlp_rows(dataset, intervals), row_schema("mlps"), replace=files.file)
        write_datasets(run.layout.arrays, groups, replace=files.file)
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
                "checkpoints": [{"step": result.step, **result.info} for result in checkpoints],
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
            }
        )
        write_sweep(run.layout.sweep, document, replace=files.file)
    return SweepReport(run, rows, log, notes, dataset, intervals, vouched)
