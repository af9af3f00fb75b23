"""The sweep of one or several runs, from prepared runs to the tables beside them."""

from __future__ import annotations

import concurrent.futures
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvjax.artifacts.checkpoint_sums import ResultStore
from kvjax.artifacts.files import read_json
from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import InputError, unusable
from kvjax.execution.inputs import PreparedRun
from kvjax.model.checkpoint import CheckpointSource
from kvjax.model.decoder import DecoderConfig
from kvjax.sweeps.ablations import chosen_ablations
from kvjax.sweeps.compiled_sweep import ProbeProgram
from kvjax.sweeps.measured import MeasuredRun, gather_measured
from kvjax.sweeps.movement_watch import MovementWatch
from kvjax.sweeps.settings import SweepSettings
from kvjax.sweeps.stream import SweepLog, sweep_run
from kvjax.task.probe_set import check_installable

if TYPE_CHECKING:
    from kvjax.sweeps.tables import SweepReport


# Raised whenever a measure changes, so that results of the older one are measured anew.
RESULT_VERSION = 3


def sweep_runs(
    prepared: Sequence[PreparedRun],
    source: Callable[[PreparedRun], CheckpointSource],
    *,
    settings: SweepSettings,
    advance: Callable[[int], None],
) -> list[SweepReport]:
    """Measures runs one after another and writes their tables; runs of one shape share a compiled program.

    Args:
      prepared: the runs.
      source: for a run, where its checkpoints come from.
      settings: the sweep's settings.
      advance: called with the number of checkpoints done.

    Raises:
      InputError: the settings leave out zero ablation, a run was measured before with other settings, or a checkpoint
        cannot be used. Tables of runs measured before it are written.
    """
    chosen_ablations(settings.ablations)
    programs: dict[Any, ProbeProgram] = {}
    reports: list[concurrent.futures.Future[SweepReport]] = []
    # One thread beside the devices: it turns a run's arrays into tables while the next run is measured.
    with concurrent.futures.ThreadPoolExecutor(1) as beside:

        def import_publishing() -> None:
            # xarray and pandas take a third of a second to import: not before the devices are at work.
            beside.submit(importlib.import_module, "kvjax.sweeps.tables")

        try:
            for work in prepared:
                identity, log = _identity(work, settings), SweepLog()
                store = _open_store(work.run, identity, settings)
                if not settings.overwrite:
                    check_installable(work.probe, work.run.layout.probe_set)
                program = _program(work, settings, programs)
                checkpoints = source(work)
                results = sweep_run(
                    work.run,
                    work.reference_first(),
                    program,
                    store,
                    checkpoints,
                    settings=settings,
                    log=log,
                    advance=advance,
                    watch=MovementWatch(work.in_step_order(), work.reference, program, store),
                    meanwhile=import_publishing,
                )
                measured = gather_measured(work, results, program, store, checkpoints, settings)
                _check_last(reports)
                reports.append(beside.submit(_publish, work, identity, measured, settings, log))
        except InputError:
            _check_last(reports)  # what stopped an earlier run is told first
            raise
    return [report.result() for report in reports]


def _program(work: PreparedRun, settings: SweepSettings, programs: dict[Any, ProbeProgram]) -> ProbeProgram:
    """Returns the program that measures a run: the one there is for its shape and probe set, or a new one."""
    config = DecoderConfig.from_model_config(work.run.config.model, len(work.benchmark.vocabulary.tokens))
    key = (config, work.probe.manifest.content_sha256)
    if key not in programs:
        num_splits = len(work.probe.manifest.splits)
        programs[key] = ProbeProgram(
            config, work.benchmark.vocabulary, work.encoded, num_splits, settings, fit=work.fit
        )
    return programs[key]


def _publish(
    work: PreparedRun, identity: Mapping[str, Any], measured: MeasuredRun, settings: SweepSettings, log: SweepLog
) -> SweepReport:
    from kvjax.sweeps.tables import publish

    return publish(work, identity, measured, settings, log)


def _check_last(reports: Sequence[concurrent.futures.Future[SweepReport]]) -> None:
    """Waits for the tables of the last run, so that no more than one run's arrays wait; raises what stopped them."""
    if reports:
        reports[-1].result()


def _identity(work: PreparedRun, settings: SweepSettings) -> dict[str, Any]:
    return {
        "result_version": RESULT_VERSION,
        "probe_set_sha256": work.probe.manifest.content_sha256,
        "fit_sha256": work.probe.manifest.fit_sha256,
        "precision": settings.precision,
        "ablations": list(settings.ablations),
        "resample_draws": settings.resample_draws,
        # Logistic probes come on top of ridge and are kept apart.
        "probe": "none" if settings.probe == "none" else "ridge",
        "model": work.run.config.model.model_dump(include={"d_model", "n_layers", "n_heads", "d_ff", "max_seq_len"}),
    }


def _open_store(run: RunDir, identity: Mapping[str, Any], settings: SweepSettings) -> ResultStore:
    record = run.layout.sweep
    if record.exists() and not settings.overwrite:
        document = read_json(record)
        before = document.get("identity") if isinstance(document, dict) else None
        if before != identity:
            before = before if isinstance(before, dict) else {}
            changed = [name for name in identity if before.get(name) != identity[name]]
            raise unusable(
                record,
                "a sweep with the same settings (or `overwrite`)",
                " and ".join(f"another {name}{_in_words(before.get(name))}" for name in changed),
            )
    return ResultStore(run.layout.measured, identity)


def _in_words(value: Any) -> str:
    """Returns a recorded setting as its flag is written, in brackets; nothing of what no flag sets."""
    if isinstance(value, list):
        value = ",".join(map(str, value))
    return f" ({value})" if isinstance(value, int | str) and len(str(value)) < 64 else ""
