"""Finds out without opening checkpoints or sums whether a run's tables are those that a sweep would draw again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from kvjax.artifacts.code_hash import CODE_SHA256
from kvjax.artifacts.files import digest, file_sha256
from kvjax.artifacts.layout import step_name
from kvjax.artifacts.provenance import software_versions
from kvjax.artifacts.results import RunResults
from kvjax.artifacts.stored_rows import StoredRows
from kvjax.errors import InputError
from kvjax.execution.inputs import BEST, RunInputs
from kvjax.model.checkpoint import CheckpointSource
from kvjax.sweeps.results import SweepLog, SweepReport
from kvjax.sweeps.settings import SweepSettings
from kvjax.task.probe_set import installed_sha256


def drawn_from(inputs: RunInputs, identity: Mapping[str, Any], settings: SweepSettings) -> str:
    """Hashes everything that a run's tables are drawn from; of measured sums, names, sizes and times of the files."""
    run, probe = inputs.run, inputs.probe
    try:
        resumed = [row.step for row in run.log.rows if row.phase == "resume"]
    except InputError:
        resumed = []
    reference = None if inputs.reference != BEST else file_sha256(inputs.wanted[BEST][1])
    with os.scandir(run.layout.measured) as files:
        sums = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return digest(
        {
            "code": [CODE_SHA256, software_versions()],
            "identity": dict(identity),
            "settings": [settings.ranked_by, settings.event_drift],
            "run": [
                run.config.model_dump(mode="json"),
                list(run.checkpoints),
                run.planned_steps,
                run.complete,
                resumed,
            ],
            "reference": [inputs.reference, inputs.reference_given, reference],
            "benchmark": [inputs.benchmark.name, inputs.benchmark.sha256, str(inputs.benchmark.path.resolve())],
            "probe_set": [str(probe.path), probe.manifest.content_sha256],
            "sums": sums,
        }
    )


def current_report(
    inputs: RunInputs, identity: Mapping[str, Any], settings: SweepSettings, source: CheckpointSource
) -> SweepReport | None:
    """Reports a run whose tables are current: nothing would be measured, converted or drawn otherwise. Else None.

    Every checkpoint and every table is hashed.

    Args:
      inputs: the run.
      identity: what its results depend on beside checkpoint files.
      settings: the sweep's settings.
      source: where checkpoints come from.
    """
    run, results = inputs.run, RunResults(inputs.run)
    if settings.overwrite or settings.probe == "logistic":  # which steps have logistic probes is looked up by the sweep
        return None
    try:
        sweep = results.sweep
        recorded = {checkpoint.step: checkpoint.sha256 for checkpoint in sweep.checkpoints}
        wanted = {name for name in inputs.wanted if name != BEST}
        if sweep.refused or not wanted <= {step_name(step) for step in recorded} or not sweep.drawn_from:
            return None
        if sweep.drawn_from != drawn_from(inputs, identity, settings) or results.checkpoint_hashes() != recorded:
            return None
        results.check_tables()
    except (InputError, OSError):
        return None
    installed = installed_sha256(run.layout.probe_set) == inputs.probe.manifest.content_sha256
    if not installed or not all(map(source.is_stored, recorded.values())):
        return None
    log = SweepLog(reused=[step for step in recorded if step_name(step) in wanted])
    return SweepReport(run, StoredRows(run.layout.rows), log, sweep.notes, sweep.vouched)
