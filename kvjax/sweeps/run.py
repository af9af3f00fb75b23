"""Sweeps runs: opens the store of each, measures it, or a share of it, and writes its tables."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvjax.artifacts.checkpoint_sums import ResultStore
from kvjax.artifacts.files import read_json
from kvjax.artifacts.identity import Identity, check_seal
from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import InputError, bad_argument, first_refusal
from kvjax.execution.inputs import RunInputs
from kvjax.model.checkpoint import CheckpointSource
from kvjax.sweeps.current_tables import current_report
from kvjax.sweeps.results import SweepReport
from kvjax.sweeps.run_sweep import Compiled, RunSweep, compiled_sweep
from kvjax.sweeps.settings import WHY_ZERO, SweepSettings
from kvjax.sweeps.shares import ShareReport
from kvjax.task.probe_set import check_installable

# Measures runs in shares: of each run the reports of its shares, or what refused one of them.
Elsewhere = Callable[[Sequence[RunInputs]], Sequence[Sequence[ShareReport] | InputError]]

# Raised whenever a measure changes, so that results of the older one are measured anew.
RESULT_VERSION = 4


def sweep_runs(
    prepared: Sequence[RunInputs],
    source: Callable[[RunInputs], CheckpointSource],
    *,
    settings: SweepSettings,
    advance: Callable[[int], None],
    elsewhere: Elsewhere | None = None,
) -> list[SweepReport]:
    """Measures runs one after another and writes their tables; runs of one shape share a compiled program.

    Args:
      prepared: the runs.
      source: for a run, where its checkpoints come from.
      settings: the sweep's settings.
      advance: called with the number of checkpoints done.
      elsewhere: measures runs in shares, which other processes may do; here only their tables are written then.

    Raises:
      InputError: the settings leave out zero ablation, a run was measured before with other settings, or a checkpoint
        cannot be used. Tables of runs measured before it are written; in shares, those of all other runs.
    """
    compiled: Compiled = {}
    reports: list[concurrent.futures.Future[SweepReport]] = []
    known: dict[int, SweepReport | None] = {}
    shares: dict[int, Sequence[ShareReport] | InputError] = {}
    refused: list[tuple[str, InputError]] = []
    if elsewhere is not None:
        for place, inputs in enumerate(prepared):
            known[place] = current_report(inputs, open_results(inputs, settings)[0], settings, source(inputs))
        behind = [place for place, report in known.items() if report is None]
        shares = dict(zip(behind, elsewhere([prepared[place] for place in behind]), strict=True))
    # One thread beside the devices: it turns a run's arrays into tables while the next run is measured.
    with concurrent.futures.ThreadPoolExecutor(1) as beside:

        def tabulate(*measured: Any) -> SweepReport:
            # xarray and pandas take a third of a second to import: not before the devices are at work.
            return importlib.import_module("kvjax.sweeps.tables").publish(*measured)

        try:
            for place, inputs in enumerate(prepared):
                identity, store = open_results(inputs, settings)
                checkpoints = source(inputs)
                if place not in known:
                    known[place] = current_report(inputs, identity, settings, checkpoints)
                if (current := known[place]) is not None:
                    advance(len(inputs.wanted))
                    reports.append(beside.submit(lambda report=current: report))
                    continue
                of_shares = shares.get(place)
                if isinstance(of_shares, InputError):
                    refused.append((str(inputs.run.path), of_shares))
                    continue
                program = compiled_sweep(inputs, settings, compiled)
                if of_shares is not None:
                    as_measured = dataclasses.replace(settings, overwrite=False)
                    sweep = RunSweep(inputs, program, store, checkpoints, as_measured)
                    measured = sweep.collect(of_shares)
                else:
                    sweep = RunSweep(inputs, program, store, checkpoints, settings)
                    measured = sweep.measure(
                        advance, meanwhile=lambda: beside.submit(importlib.import_module, "kvjax.sweeps.tables")
                    )
                _check_last(reports)
                reports.append(beside.submit(tabulate, inputs, identity, measured, settings, sweep.log))
        except InputError:
            _check_last(reports)  # the error of an earlier run comes first
            raise
    written = [report.result() for report in reports]
    if refused:
        raise first_refusal(refused, len(prepared))
    return written


def measure_share(
    inputs: RunInputs,
    names: Sequence[str],
    source: CheckpointSource,
    *,
    settings: SweepSettings,
    advance: Callable[[int], None],
    compiled: Compiled,
) -> ShareReport:
    """Measures a share of a run's checkpoints into the run's measured sums, and writes no tables.

    Files of other shares are read only if checkpoints of this one are compared with them.

    Args:
      inputs: the run, with all checkpoints that its sweep measures.
      names: of the share's, consecutive ones in the order of steps.
      source: where checkpoints come from.
      settings: the sweep's settings.
      advance: called with the number of checkpoints done.
      compiled: the programs compiled so far, to which this adds its own.

    Raises:
      InputError: as `sweep_runs`. Results stored before stay.
    """
    _, store = open_results(inputs, settings)
    sweep = RunSweep(inputs, compiled_sweep(inputs, settings, compiled), store, source, settings)
    return sweep.measure_share(names, advance)


def open_results(inputs: RunInputs, settings: SweepSettings) -> tuple[dict[str, Any], ResultStore]:
    """Opens the measured sums of a run, and returns what they depend on beside checkpoint files, and the store.

    Raises:
      InputError: the settings leave out zero ablation, or the run was measured before with other settings or on another
        probe set and may not be measured again.
    """
    if not settings.ablations:
        raise bad_argument("ablations", f"zero among the kinds, {WHY_ZERO}", "none")
    identity = _identity(inputs, settings)
    store = _open_store(inputs.run, identity, settings)
    if not settings.overwrite:
        check_installable(inputs.probe, inputs.run.layout.probe_set)
    return identity, store


def _check_last(reports: Sequence[concurrent.futures.Future[SweepReport]]) -> None:
    """Waits for the tables of the last run, so that no more than one run's arrays wait; raises what stopped them."""
    if reports:
        reports[-1].result()


def _identity(inputs: RunInputs, settings: SweepSettings) -> dict[str, Any]:
    return {
        "result_version": RESULT_VERSION,
        "probe_set_sha256": inputs.probe.manifest.content_sha256,
        "fit_sha256": inputs.probe.manifest.fit_sha256,
        "precision": settings.precision,
        "ablations": list(settings.ablations),
        "resample_draws": settings.resample_draws,
        # Logistic probes come on top of ridge and are kept apart.
        "probe": "none" if settings.probe == "none" else "ridge",
        "model": inputs.run.config.model.model_dump(include={"d_model", "n_layers", "n_heads", "d_ff", "max_seq_len"}),
    }


def _open_store(run: RunDir, identity: Mapping[str, Any], settings: SweepSettings) -> ResultStore:
    """Opens the store of a run's sums; raises `InputError` if its sweep had other settings and may not be replaced."""
    recorded, sweep = _recorded_identity(run.layout.sweep), run.layout.sweep
    recorded = recorded and {"settings": recorded, "inputs": {}}
    Identity(identity, {}).decide(recorded, sweep, overwrite=settings.overwrite)
    return ResultStore(run.layout.measured, identity)


def _recorded_identity(sweep: Path) -> dict[str, Any] | None:
    """Reads the identity in a `sweep.json`.

    A file that is damaged, edited or names none protects nothing: the sums of each checkpoint carry their own identity.
    """
    try:
        document = read_json(sweep)
        if isinstance(document, dict) and "content_sha256" in document:
            check_seal(document, sweep, "")
    except InputError:
        return None
    identity = document.get("identity") if isinstance(document, dict) else None
    return identity if isinstance(identity, dict) else None
