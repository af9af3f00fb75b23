"""Reads files as commands do, everything that they read of them, and checks accepted values that differ."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch
from kvjax.converters.cached_loader import store_identity
from kvjax.converters.convert import convert_checkpoint
from kvjax.converters.parameter_store import ParameterStore, stored_sha256s
from kvjax.converters.to_torch import to_torch

from benchmarks.fuzzing.material import BENCHMARK, RANKING, RUN
from benchmarks.fuzzing.reader import fingerprint
from kvjax.artifacts.checkpoint_sums import ResultStore
from kvjax.artifacts.comparison_schema import Comparison, read_comparison
from kvjax.artifacts.factor_schema import FactorComparison, read_factor
from kvjax.artifacts.files import HashedFile, read_json
from kvjax.artifacts.find_runs import find_run_dirs
from kvjax.artifacts.layout import ComparisonLayout, step_of
from kvjax.artifacts.results import Intervention, open_results
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.tables import read_dataset
from kvjax.config.files import read_config
from kvjax.config.train import TrainConfig
from kvjax.intervene.analysis import InterventionReport
from kvjax.intervene.plan import chosen_windows
from kvjax.intervene.settings import InterventionSettings
from kvjax.pipeline.background_writer import BackgroundWriter
from kvjax.pipeline.comparison_files import check_comparison_files
from kvjax.pipeline.evaluate import evaluation_is_current
from kvjax.pipeline.resume import read_resumed
from kvjax.pipeline.run_history import RunHistory
from kvjax.pipeline.run_recorder import FileRecorder
from kvjax.pipeline.select_reference import ranking_is_current
from kvjax.pipeline.status import readiness
from kvjax.pipeline.text import print_readiness
from kvjax.report.text import print_intervention_report
from kvjax.task.benchmark import Benchmark
from kvjax.task.encoding import encode_records
from kvjax.task.pairs import open_pairs
from kvjax.task.probe_set import open_probe_set

_PROBE = f"{RUN}/analysis/probe_set"


def read_config_of(schema: type[pydantic.BaseModel]) -> Callable[[Path, Path], Any]:
    """Makes the function that reads a config."""
    return lambda root, file: read_config(file, schema)


def check_written_again(value: pydantic.BaseModel, sound: Any, file: Path) -> str | None:
    """Checks that a config is one that could be written down: finite, and the same when read again."""
    del sound, file
    written = json.loads(json.dumps(value.model_dump(mode="json"), allow_nan=False))
    return None if type(value).model_validate(written) == value else "another config when written and read again"


def read_run_config(root: Path, file: Path) -> Any:
    """Opens a run and checks its status."""
    run = RunDir.open(root / RUN)
    return run.config, run.benchmark_dir(), _status(root)


def read_metadata(root: Path, file: Path) -> Any:
    """Opens a benchmark; returns all but its path and hash, and the hash."""
    benchmark = Benchmark.open(root / BENCHMARK)
    return dataclasses.replace(benchmark, path=Path()), benchmark.sha256


def read_records(root: Path, file: Path) -> Any:
    """Reads a split and encodes it as arrays."""
    benchmark = Benchmark.open(root / BENCHMARK)
    records = benchmark.read_split(file.stem)
    encode_records(records, benchmark.vocabulary, [file.stem], max_seq_len=64)
    return records, benchmark.sha256


def check_identity(value: Any, sound: Any, file: Path) -> str | None:
    """Checks that a benchmark of other content has another hash, which all that was measured on it is compared with."""
    del file
    return None if value[1] != sound[1] else "other content under the same hash of the benchmark"


def read_probe_set(root: Path, file: Path) -> Any:
    """Opens a probe set and encodes it."""
    benchmark = Benchmark.open(root / BENCHMARK)
    probe = open_probe_set(root / f"{_PROBE}.jsonl", benchmark)
    encode_records(probe.records, benchmark.vocabulary, probe.manifest.splits, max_seq_len=64)
    return probe.manifest, probe.records, probe.fit_records, probe.sources


def read_pairs(root: Path, file: Path) -> Any:
    """Opens the pairs of the run's probe set."""
    benchmark = Benchmark.open(root / BENCHMARK)
    pairs = open_pairs(open_probe_set(root / f"{_PROBE}.jsonl", benchmark), benchmark)
    return pairs.manifest, pairs.pairs


def read_converted(root: Path, file: Path) -> Any:
    """Converts a checkpoint."""
    run, benchmark = RunDir.open(root / RUN), Benchmark.open(root / BENCHMARK)
    converted = convert_checkpoint(file, run.config, benchmark, expected_step=step_of(file))
    return converted.step, converted.params, converted.recorded_config, converted.recorded_metrics, converted.notes


def check_tensors(value: Any, sound: Any, file: Path) -> str | None:
    """Checks accepted parameters against the tensors that PyTorch itself reads from the file.

    Nothing foreign is unpickled: this process has just written the file.
    """
    del sound
    tensors = dict(_tensors(torch.load(file, weights_only=False)))
    for name, array in to_torch(value[1]).items():
        # A tied unembedding may be stored once, under either name, which is noted.
        if not any(key.endswith(name) for key in tensors):
            name = {"lm_head.weight": "token_embedding.weight", "token_embedding.weight": "lm_head.weight"}.get(
                name, name
            )
        if not any(
            key.endswith(name) and np.array_equal(tensor.float().numpy(), array.numpy(), equal_nan=True)
            for key, tensor in tensors.items()
        ):
            return f"{name} is not what the file holds"
    return None


def _tensors(document: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(document, np.ndarray) and document.dtype.kind in "fiub":
        document = torch.from_numpy(document)
    if isinstance(document, torch.Tensor):
        if not document.is_sparse and not document.is_complex():
            yield prefix, document.detach()
    elif isinstance(document, Mapping):
        for key, part in document.items():
            yield from _tensors(part, f"{prefix}.{key}")


def read_resumed_state(root: Path, file: Path) -> Any:
    """Reads what `train --resume` goes on from."""
    resumed = read_resumed({root / RUN: _training_config(root)}, Benchmark.open(root / BENCHMARK))
    (run,) = resumed.runs
    moments = run.optimizer.accumulators
    return run.optimizer.count, moments["exp_avg"], moments["exp_avg_sq"], run.params, resumed.step


def _training_config(root: Path) -> TrainConfig:
    return read_config(root / f"{RUN}/run_config.json", TrainConfig, recorded=True)


def check_moments(value: Any, sound: Any, file: Path) -> str | None:
    """Checks that accepted moments are finite, the second ones not negative, and their step a whole number."""
    del sound, file
    count, mu, nu = value[:3]
    first, second = to_torch(mu).values(), to_torch(nu).values()
    if not isinstance(count, int) or count < 0:
        return f"step {count}"
    if not all(torch.isfinite(moment).all() for moment in (*first, *second)):
        return "moments that are not finite"
    return "negative second moments" if any((moment < 0).any() for moment in second) else None


def read_tables(root: Path, file: Path) -> Any:
    """Reads the tables of a sweep."""
    results = open_results(root / RUN)
    if file.suffix == ".nc":
        return [part.to_dict() for part in (results.metrics, results.intervals, results.events)]
    return results.rows, results.heads, results.mlps


def _status(root: Path) -> Any:
    (run,) = find_run_dirs([str(root / RUN)])
    state = readiness(run)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        print_readiness([state], reasons=True)
    if any(ord(character) < 32 and character != "\n" for character in said.getvalue()):
        raise AssertionError("control characters are printed")
    return {name: dataclasses.asdict(condition) for name, condition in state.conditions.items()}


def read_sweep_and_status(root: Path, file: Path) -> Any:
    """Reads the provenance of a sweep, and what depends on it."""
    state, results = _status(root), open_results(root / RUN)
    return results.sweep, results.sweep.measured_on, results.rows, state


def read_windows_and_status(root: Path, file: Path) -> Any:
    """Reads birth windows, and chooses those to intervene in."""
    state, run = _status(root), RunDir.open(root / RUN)
    windows = open_results(root / RUN).windows
    return windows, chosen_windows(run, InterventionSettings(force=True)), state


def read_story_and_status(root: Path, file: Path) -> Any:
    """Reads the story of a run, and prints it as `status` does."""
    state = _status(root)
    return open_results(root / RUN).story, state


def read_summary(root: Path, file: Path) -> Any:
    """Reads the summary of an intervention and prints it, as one that is reused."""
    run, path = RunDir.open(root / RUN), file.with_suffix(".json")
    summary = Intervention.open(path)
    arrays = summary.dataset.to_dict() if file.suffix == ".nc" else summary.check_arrays()
    report = InterventionReport(run, summary.kind, summary.window, path, dict(summary.document), reused=True)
    with contextlib.redirect_stdout(io.StringIO()):
        print_intervention_report(report)
    return summary.document, arrays


def read_compared(root: Path, file: Path) -> Any:
    """Reads a comparison of runs with its arrays, as `report` does."""
    layout = ComparisonLayout(file.parent)
    document = read_comparison(layout.comparison)
    return document, _arrays(layout, document, (None, "events", "order", "matching"))


def read_compared_factor(root: Path, file: Path) -> Any:
    """Reads the comparison of a factor's settings with its arrays, as `report` does."""
    layout = ComparisonLayout(file.parent, "factor")
    document = read_factor(layout.comparison)
    return document, _arrays(layout, document, [entry.label for entry in document.settings])


def _arrays(layout: ComparisonLayout, document: Comparison | FactorComparison, groups: Sequence[str | None]) -> Any:
    check_comparison_files(layout, document.arrays, document.files, remedy="made again")
    return [read_dataset(layout.arrays, group=group, expected="arrays").to_dict() for group in groups]


def check_unsealed(value: Any, sound: Any, file: Path) -> str | None:
    """Checks that a document lost nothing but the hash of its own content: files of older versions have none."""
    del file
    found, was = (_fields(one[0]) for one in (value, sound))
    was.pop("content_sha256")
    if found.get("content_sha256"):
        return "another content under a hash of it"
    changed = [name for name in was if fingerprint(found.get(name)) != fingerprint(was[name])]
    return f"{changed[0]} was changed" if changed else None


def _fields(document: Any) -> dict[str, Any]:
    return document.model_dump() if isinstance(document, pydantic.BaseModel) else dict(document)


def read_store(root: Path, file: Path) -> Any:
    """Reads the store's manifest, and what a loader finds in it for the run's checkpoints."""
    run, benchmark = RunDir.open(root / RUN), Benchmark.open(root / BENCHMARK)
    known = stored_sha256s(run.layout.converted)
    store = ParameterStore(run.layout.converted, store_identity(run, benchmark))
    files = [HashedFile.read(path, "a checkpoint") for path in run.checkpoints.values()]
    found = [store.find(file) for file in files]
    return known, [checkpoint and (checkpoint.step, checkpoint.params, checkpoint.notes) for checkpoint in found]


def check_cache_miss(value: Any, sound: Any, file: Path) -> str | None:
    """Checks that every checkpoint is either found as it was stored, or not found."""
    del file
    pairs = zip(value[1], sound[1], strict=True)
    same = all(found is None or fingerprint(found) == fingerprint(was) for found, was in pairs)
    return None if same else "other parameters for the same file"


def read_sums(root: Path, file: Path) -> Any:
    """Finds the measured sums of the last checkpoint; None if they count as missing."""
    results = open_results(root / RUN)
    sha256 = {checkpoint.step: checkpoint.sha256 for checkpoint in results.sweep.checkpoints}
    key = sha256[max(sha256)]
    found = ResultStore(results.run.layout.measured, results.sweep.identity).find(file.stem, key)
    return found and (found.step, found.arrays, found.info)


def check_missing(value: Any, sound: Any, file: Path) -> str | None:
    """Checks that sums which differ count as missing."""
    del sound, file
    return None if value is None else "other sums for the same checkpoint"


def read_metrics(root: Path, file: Path) -> Any:
    """Reads what a run logged."""
    run = RunDir.open(root / RUN)
    return [row.values for row in run.log.rows], run.log.evaluations(), run.planned_steps, run.complete


def read_resumed_metrics(root: Path, file: Path) -> Any:
    """Goes on after half of the run, as `train --resume` does before its first step."""
    run, config = RunDir.open(root / RUN), _training_config(root)
    every = config.checkpoint_every_steps
    history = RunHistory.of(run.log, every * (config.num_steps // every // 2), config.checkpointing)
    with BackgroundWriter(pending=1) as writer:
        recorder = FileRecorder(root / RUN, config, 0, {}, writer)
        recorder.go_on(history)
    record = run.layout.best_record  # none if the best of these rows is of a checkpoint that is gone
    return recorder.last_evaluations, record.is_file() and read_json(record), history.lines


def read_best(root: Path, file: Path) -> Any:
    """Finds the best checkpoint."""
    step, path = RunDir.open(root / RUN).best_checkpoint()
    return step, path.name


def read_evaluation(root: Path, file: Path) -> Any:
    """Checks whether the evaluation is current."""
    return evaluation_is_current(RunDir.open(root / RUN))


def read_ranking(root: Path, file: Path) -> Any:
    """Checks whether the ranking is current."""
    return ranking_is_current([RunDir.open(root / RUN)], root / RANKING)


def check_nothing(value: Any, sound: Any, file: Path) -> None:
    """Accepts any value that the reader took without an error: nothing in the file says what it was."""
    del value, sound, file
