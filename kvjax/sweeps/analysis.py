"""The sweep of one or several runs, from run directories to the tables beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from kvjax.artifacts.files import read_json, write_json
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
from kvjax.errors import unusable
from kvjax.model.decoder import DecoderConfig
from kvjax.sweeps.dataset import build_dataset, build_events
from kvjax.sweeps.intervals import build_intervals
from kvjax.sweeps.logistic import measure_logistic
from kvjax.sweeps.means import ProbeIndex
from kvjax.sweeps.movement import MovementWatch, measure_movement
from kvjax.sweeps.rows import checkpoint_rows, head_rows, mlp_rows
from kvjax.sweeps.stream import (
    RESULT_VERSION,
    CheckpointSource,
    ProbeProgram,
    SweepLog,
    SweepSettings,
    sweep_run,
)
from kvjax.task.benchmark import Benchmark
from kvjax.task.encoding import EncodedRecords, encode_records
from kvjax.task.probe_set import ProbeSet, check_installable, install_probe_set, open_probe_set, own_probe_set

BEST = "best"  # the result name of the best checkpoint, which may be no step checkpoint

_CERTIFICATE_SEQUENCES = 16


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


@dataclasses.dataclass(frozen=True)
class PreparedRun:
    """A run with its benchmark, probe set and the checkpoint files to measure.

    Attributes:
      wanted: result name -> (step the file's name states or None, file) of what this sweep measures.
      named: those of them that `--steps` names; the reference is measured with them.
      reference: result name of the checkpoint that drift is measured to; None where the run has none yet.
    """

    run: RunDir
    benchmark: Benchmark
    probe: ProbeSet
    encoded: EncodedRecords
    fit: EncodedRecords
    wanted: Mapping[str, tuple[int | None, Path]]
    named: frozenset[str]
    reference: str | None

    def reference_first(self) -> dict[str, tuple[int | None, Path]]:
        """Returns the files in the order to measure: what comes after the reference is compared with it at once."""
        first = {self.reference: self.wanted[self.reference]} if self.reference else {}
        return first | dict(self.wanted)

    def in_step_order(self) -> list[str]:
        """Returns the names of the checkpoints that rows are wanted of."""
        return sorted(
            (name for name, (step, _) in self.wanted.items() if step is not None), key=lambda n: self.wanted[n][0]
        )

    @property
    def certificate_tokens(self) -> np.ndarray:
        """Sample sequences for parity certificates, spread over the probe set: [B, T]."""
        spread = np.linspace(0, len(self.encoded) - 1, min(_CERTIFICATE_SEQUENCES, len(self.encoded)))
        return self.encoded.tokens[spread.astype(int)]


def prepare_run(
    run: RunDir, *, benchmark_dir: str | None, probe_set: str | None, steps: str, reference: str
) -> PreparedRun:
    """Returns a run with everything a sweep of it needs, checked; nothing is measured yet.

    Without `probe_set`, the one in the run's analysis folder is used, or made there.

    Raises:
      InputError: benchmark, probe set, steps or reference cannot be used.
    """
    benchmark = Benchmark.open(run.benchmark_dir(benchmark_dir))
    wanted = {_result_name(step): (step, run.checkpoints[step]) for step in run.select_steps(steps)}
    named = frozenset(wanted)
    reference_name = _reference_name(run, reference)
    if reference_name == BEST:
        wanted[BEST] = (None, run.best_checkpoint()[1])
    elif reference_name is not None:
        step = int(reference_name.removeprefix("step_"))
        wanted[reference_name] = (step, run.checkpoints[step])
    given = Path(probe_set) if probe_set else None
    probe = open_probe_set(given, benchmark) if given else own_probe_set(run.analysis, benchmark)
    encoded = encode_records(
        probe.records,
        benchmark.vocabulary,
        probe.manifest.splits,
        max_seq_len=run.config.model.max_seq_len,
    )
    fit = encode_records(
        probe.fit_records,
        benchmark.vocabulary,
        [probe.manifest.fit_split],
        max_seq_len=run.config.model.max_seq_len,
    )
    return PreparedRun(run, benchmark, probe, encoded, fit, wanted, named, reference_name)


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
      InputError: a run was measured before with other settings, or a checkpoint cannot be used.
    """
    programs: dict[Any, ProbeProgram] = {}
    reports = []
    for work in prepared:
        store = _open_store(work, settings)
        if not settings.overwrite:
            check_installable(work.probe, work.run.analysis)
        config = DecoderConfig.from_model_config(work.run.config.model, len(work.benchmark.vocabulary.tokens))
        key = (config, work.probe.manifest.content_sha256)
        if key not in programs:
            programs[key] = ProbeProgram(
                config,
                work.benchmark.vocabulary,
                work.encoded,
                len(work.probe.manifest.splits),
                settings,
                fit=work.fit,
            )
        log = SweepLog()
        checkpoints = source(work)
        results = sweep_run(
            work.run,
            work.reference_first(),
            programs[key],
            store,
            checkpoints,
            settings=settings,
            log=log,
            advance=advance,
            watch=MovementWatch(work.in_step_order(), work.reference, programs[key], store),
        )
        reports.append(_publish(work, results, programs[key], store, checkpoints, settings, log))
    return reports


def _result_name(step: int) -> str:
    return f"step_{step:06d}"


def _reference_name(run: RunDir, reference: str) -> str | None:
    if reference == "final":
        return _result_name(max(run.checkpoints)) if run.complete else None
    if reference == BEST:
        return BEST
    if not reference.isdecimal():
        raise unusable("--reference", "final, best or a step", reference)
    if int(reference) not in run.checkpoints:
        raise unusable(run.path / "checkpoints", f"a checkpoint for --reference={reference}", run.describe_steps())
    return _result_name(int(reference))


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


def _open_store(work: PreparedRun, settings: SweepSettings) -> ResultStore:
    identity = _identity(work, settings)
    record = work.run.analysis / "sweep.json"
    if record.exists() and not settings.overwrite:
        document = read_json(record)
        before = document.get("identity") if isinstance(document, dict) else None
        if before != identity:
            before = before if isinstance(before, dict) else {}
            changed = [name for name in identity if before.get(name) != identity[name]]
            raise unusable(
                record, "a sweep with the same settings (or --overwrite)", f"another {' and '.join(changed)}"
            )
    return ResultStore(work.run.analysis / "measured", identity)


def _publish(
    work: PreparedRun,
    results: Mapping[str, CheckpointResult],
    program: ProbeProgram,
    store: ResultStore,
    source: CheckpointSource,
    settings: SweepSettings,
    log: SweepLog,
) -> SweepReport:
    """Renders the tables of everything measured on the run so far, each file replaced whole."""
    run, results = work.run, dict(results)
    for step, path in run.checkpoints.items():
        # Steps measured earlier stay in the tables whatever `--steps` this sweep was given.
        name = _result_name(step)
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
    files = {_result_name(step): (step, path) for step, path in run.checkpoints.items()} | dict(work.wanted)
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
            "identity": _identity(work, settings),
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
