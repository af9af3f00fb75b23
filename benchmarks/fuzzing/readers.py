"""Lists every reader of files: what to damage, how to read it, and when a changed value may be accepted."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import random
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

from benchmarks.fuzzing.material import BENCHMARK, CONFIGS, RANKING, RUN, STEPS
from benchmarks.fuzzing.mutations import damage_bytes, damage_checkpoint, damage_json, damage_json_lines
from kvjax.artifacts.checkpoint_sums import ResultStore
from kvjax.artifacts.files import HashedFile, read_json
from kvjax.artifacts.find_runs import find_run_dirs
from kvjax.artifacts.layout import step_name, step_of
from kvjax.artifacts.results import Intervention, open_results
from kvjax.artifacts.run_dir import RunDir
from kvjax.config.benchmark import BenchmarkConfig
from kvjax.config.files import read_config
from kvjax.config.train import TrainConfig
from kvjax.config.windows import WindowConfig
from kvjax.errors import InputError
from kvjax.intervene.analysis import InterventionReport
from kvjax.intervene.plan import chosen_windows
from kvjax.intervene.settings import InterventionSettings
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

Damage = Callable[[random.Random, bytes], bytes]
_BYTES, _JSON, _LINES = (damage_bytes,), (damage_bytes, damage_json), (damage_bytes, damage_json_lines)


@dataclasses.dataclass(frozen=True)
class Reader:
    """One kind of file and the code that reads it.

    Attributes:
      what: what is damaged, for the table.
      files: paths below the material's folder, one of which is damaged.
      damages: how; one is chosen.
      read: reads everything that a command reads from the file and returns it; gets the material's folder and the file.
      changed: what an accepted value that differs from the sound file's means, for the table.
      check: returns what is wrong with an accepted value that differs; None if every such value is a defect.
      names: names that a refusal may give beside the file's: those of files that are read together with it.
      share: of the inputs, beside other readers'.
    """

    what: str
    files: Sequence[str]
    damages: Sequence[Damage]
    read: Callable[[Path, Path], Any]
    changed: str
    check: Callable[[Any, Any, Path], str | None] | None = None
    names: Sequence[str] = ()
    share: float = 1.0


_DETECTED = "a defect: a hash covers the file"
_ANALYSIS = f"{RUN}/analysis"
_PROBE = f"{_ANALYSIS}/probe_set"


def _config(schema: type[pydantic.BaseModel]) -> Callable[[Path, Path], Any]:
    return lambda root, file: read_config(file, schema)


def _same_if_written_again(value: pydantic.BaseModel, sound: Any, file: Path) -> str | None:
    """Checks that a config is one that could be written down: finite, and the same when read again."""
    del sound, file
    written = json.loads(json.dumps(value.model_dump(mode="json"), allow_nan=False))
    return None if type(value).model_validate(written) == value else "another config when written and read again"


def _run_config(root: Path, file: Path) -> Any:
    run = RunDir.open(root / RUN)
    return run.config, run.benchmark_dir(), _status(root)


def _metadata(root: Path, file: Path) -> Any:
    benchmark = Benchmark.open(root / BENCHMARK)
    return dataclasses.asdict(dataclasses.replace(benchmark, path=None, sha256="")), benchmark.sha256


def _records(root: Path, file: Path) -> Any:
    benchmark = Benchmark.open(root / BENCHMARK)
    records = benchmark.read_split(file.stem)
    encode_records(records, benchmark.vocabulary, [file.stem], max_seq_len=64)
    return records, benchmark.sha256


def _other_identity(value: Any, sound: Any, file: Path) -> str | None:
    """Checks that a benchmark of other content has another hash, which all that was measured on it is compared with."""
    del file
    return None if value[1] != sound[1] else "other content under the same hash of the benchmark"


def _probe_set(root: Path, file: Path) -> Any:
    benchmark = Benchmark.open(root / BENCHMARK)
    probe = open_probe_set(root / f"{_PROBE}.jsonl", benchmark)
    encode_records(probe.records, benchmark.vocabulary, probe.manifest.splits, max_seq_len=64)
    return probe.manifest, probe.records, probe.fit_records, probe.sources


def _pairs(root: Path, file: Path) -> Any:
    benchmark = Benchmark.open(root / BENCHMARK)
    pairs = open_pairs(open_probe_set(root / f"{_PROBE}.jsonl", benchmark), benchmark)
    return pairs.manifest, pairs.pairs


def _checkpoint(root: Path, file: Path) -> Any:
    run, benchmark = RunDir.open(root / RUN), Benchmark.open(root / BENCHMARK)
    converted = convert_checkpoint(file, run.config, benchmark, expected_step=step_of(file))
    return converted.step, converted.params, converted.recorded_config, converted.recorded_metrics, converted.notes


def _numbers_of_the_file(value: Any, sound: Any, file: Path) -> str | None:
    """Checks accepted parameters against the tensors that PyTorch itself reads from the file.

    Nothing foreign is unpickled: this process has just written the file.
    """
    del sound
    tensors = dict(_tensors(torch.load(file, weights_only=False)))
    for name, array in to_torch(value[1]).items():
        if name == "lm_head.weight" and not any(key.endswith(name) for key in tensors):
            name = "token_embedding.weight"  # a tied unembedding stored once, which is noted
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


def _resumed(root: Path, file: Path) -> Any:
    resumed = read_resumed({root / RUN: _training_config(root)}, Benchmark.open(root / BENCHMARK))
    (run,) = resumed.runs
    return run.moments.count, run.moments.mu, run.moments.nu, run.params, resumed.step


def _training_config(root: Path) -> TrainConfig:
    return read_config(root / f"{RUN}/run_config.json", TrainConfig, recorded=True)


def _possible_moments(value: Any, sound: Any, file: Path) -> str | None:
    """Checks that accepted moments are finite, the second ones not negative, and their step a whole number."""
    del sound, file
    count, mu, nu = value[:3]
    first, second = to_torch(mu).values(), to_torch(nu).values()
    if not isinstance(count, int) or count < 0:
        return f"step {count}"
    if not all(torch.isfinite(moment).all() for moment in (*first, *second)):
        return "moments that are not finite"
    return "negative second moments" if any((moment < 0).any() for moment in second) else None


def _tables(root: Path, file: Path) -> Any:
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


def _sweep(root: Path, file: Path) -> Any:
    state, results = _status(root), open_results(root / RUN)
    return results.sweep, results.sweep.measured_on, results.rows, state


def _windows(root: Path, file: Path) -> Any:
    state, run = _status(root), RunDir.open(root / RUN)
    windows = open_results(root / RUN).windows
    return windows, chosen_windows(run, InterventionSettings(force=True)), state


def _intervention(root: Path, file: Path) -> Any:
    run, path = RunDir.open(root / RUN), file.with_suffix(".json")
    summary = Intervention.open(path)
    arrays = summary.dataset.to_dict() if file.suffix == ".nc" else summary.check_arrays()
    report = InterventionReport(run, summary.kind, summary.window, path, dict(summary.document), reused=True)
    with contextlib.redirect_stdout(io.StringIO()):
        print_intervention_report(report)
    return summary.document, arrays


def _store(root: Path, file: Path) -> Any:
    """Reads the store's manifest, and what a loader finds in it for the run's checkpoints."""
    run, benchmark = RunDir.open(root / RUN), Benchmark.open(root / BENCHMARK)
    known = stored_sha256s(run.layout.converted)
    store = ParameterStore(run.layout.converted, store_identity(run, benchmark))
    files = [HashedFile.read(path, "a checkpoint") for path in run.checkpoints.values()]
    found = [store.find(file) for file in files]
    return known, [checkpoint and (checkpoint.step, checkpoint.params, checkpoint.notes) for checkpoint in found]


def _a_cache_miss(value: Any, sound: Any, file: Path) -> str | None:
    """Checks that every checkpoint is either found as it was stored, or not found."""
    del file
    pairs = zip(value[1], sound[1], strict=True)
    same = all(found is None or fingerprint(found) == fingerprint(was) for found, was in pairs)
    return None if same else "other parameters for the same file"


def _sums(root: Path, file: Path) -> Any:
    results = open_results(root / RUN)
    sha256 = {checkpoint.step: checkpoint.sha256 for checkpoint in results.sweep.checkpoints}
    key = sha256[max(sha256)]
    found = ResultStore(results.run.layout.measured, results.sweep.identity).find(file.stem, key)
    return found and (found.step, found.arrays, found.info)


def _missing(value: Any, sound: Any, file: Path) -> str | None:
    del sound, file
    return None if value is None else "other sums for the same checkpoint"


def _metrics(root: Path, file: Path) -> Any:
    run = RunDir.open(root / RUN)
    return [row.values for row in run.log.rows], run.log.evaluations(), run.planned_steps, run.complete


def _resumed_metrics(root: Path, file: Path) -> Any:
    """Goes on after half of the run, as `train --resume` does before its first step."""
    run, config = RunDir.open(root / RUN), _training_config(root)
    every = config.checkpoint_every_steps
    history = RunHistory.of(run.log, every * (config.num_steps // every // 2), config.checkpointing)
    recorder = FileRecorder(root / RUN, config, 0, {})
    recorder.go_on(history)
    record = run.layout.best_record  # none if the best of these rows is of a checkpoint that is gone
    return recorder.last_evaluations, record.is_file() and read_json(record), history.lines


def _best(root: Path, file: Path) -> Any:
    step, path = RunDir.open(root / RUN).best_checkpoint()
    return step, path.name


def _evaluation(root: Path, file: Path) -> Any:
    return evaluation_is_current(RunDir.open(root / RUN))


def _ranking(root: Path, file: Path) -> Any:
    return ranking_is_current([RunDir.open(root / RUN)], root / RANKING)


def _unseen(value: Any, sound: Any, file: Path) -> None:
    """Accepts any value that the reader took without an error: nothing in the file says what it was."""
    del value, sound, file


def readers_of(step: int) -> dict[str, Reader]:
    """Lists the readers by name, for a material whose run ends at a step."""
    return {
        "benchmark config": Reader(
            "`generate-benchmark --config`",
            [f"{CONFIGS}/benchmark.json"],
            _JSON,
            _config(BenchmarkConfig),
            "another valid config, the same when written and read again",
            _same_if_written_again,
        ),
        "training config": Reader(
            "`train --config`",
            [f"{CONFIGS}/train.json"],
            _JSON,
            _config(TrainConfig),
            "another valid config, the same when written and read again",
            _same_if_written_again,
        ),
        "window config": Reader(
            "`birth-windows --config`",
            [f"{CONFIGS}/windows.json"],
            _JSON,
            _config(WindowConfig),
            "another valid config, the same when written and read again",
            _same_if_written_again,
        ),
        "run_config.json": Reader(
            "opening a run, `status`",
            [f"{RUN}/run_config.json"],
            _JSON,
            _run_config,
            "another valid config",
            lambda value, sound, file: _same_if_written_again(value[0], sound, file),
            names=("run",),
        ),
        "benchmark metadata": Reader(
            "opening a benchmark",
            [f"{BENCHMARK}/metadata.json"],
            _JSON,
            _metadata,
            "another benchmark, by another hash",
            _other_identity,
            names=(BENCHMARK,),
        ),
        "benchmark records": Reader(
            "reading and encoding a split",
            [f"{BENCHMARK}/{split}.jsonl" for split in ("train", "validation_iid", "counterfactual", "structural_ood")],
            _LINES,
            _records,
            "another benchmark, by another hash",
            _other_identity,
            names=("metadata.json",),
        ),
        "probe set": Reader(
            "opening and encoding a probe set",
            [f"{_PROBE}.jsonl", f"{_PROBE}.fit.jsonl", f"{_PROBE}.sources.jsonl"],
            _LINES,
            _probe_set,
            _DETECTED,
        ),
        "probe set's manifest": Reader(
            "opening a probe set",
            [f"{_PROBE}.metadata.json"],
            _JSON,
            _probe_set,
            _DETECTED,
            names=("probe_set.",),
        ),
        "pairs": Reader("opening pairs of streams", [f"{_PROBE}.pairs.jsonl"], _LINES, _pairs, _DETECTED),
        "pairs' manifest": Reader(
            "opening pairs of streams",
            [f"{_PROBE}.pairs.metadata.json"],
            _JSON,
            _pairs,
            _DETECTED,
            names=("probe_set.",),
        ),
        "checkpoint (bytes)": Reader(
            "converting a `.pt` file",
            [f"{RUN}/checkpoints/{step_name(step)}.pt"],
            _BYTES,
            _checkpoint,
            "a defect: every member has a CRC-32",
        ),
        "checkpoint (document)": Reader(
            "converting a `.pt` file that was edited and saved again",
            [f"{RUN}/checkpoints/{step_name(step)}.pt"],
            (damage_checkpoint,),
            _checkpoint,
            "the very tensors of the edited file",
            _numbers_of_the_file,
            share=0.5,  # PyTorch takes 20 ms to write such a file
        ),
        "optimizer state (bytes)": Reader(
            "`train --resume`",
            [f"{RUN}/checkpoints/{step_name(step)}.pt"],
            _BYTES,
            _resumed,
            "a defect: every member has a CRC-32",
        ),
        "optimizer state (document)": Reader(
            "`train --resume` from an edited file",
            [f"{RUN}/checkpoints/{step_name(step)}.pt"],
            (damage_checkpoint,),
            _resumed,
            "finite moments, the second not negative",
            _possible_moments,
            share=0.5,
        ),
        "tables": Reader(
            "`kvjax.open_results`: rows and components",
            [
                f"{_ANALYSIS}/checkpoint_metrics.jsonl",
                f"{_ANALYSIS}/component_candidates/heads.jsonl",
                f"{_ANALYSIS}/component_candidates/mlps.jsonl",
            ],
            _LINES,
            _tables,
            _DETECTED,
        ),
        "netCDF of a sweep": Reader(
            "`kvjax.open_results`: arrays",
            [f"{_ANALYSIS}/checkpoint_metrics.nc"],
            _BYTES,
            _tables,
            _DETECTED,
        ),
        "sweep.json": Reader(
            "`kvjax.open_results`, `status`",
            [f"{_ANALYSIS}/sweep.json"],
            _JSON,
            _sweep,
            "other provenance; tables and checkpoints agree with its hashes",
            _unseen,
            names=("checkpoint_metrics", "heads.jsonl", "mlps.jsonl"),
        ),
        "birth_windows.json": Reader(
            "`kvjax.open_results`, `status`, windows to intervene in",
            [f"{_ANALYSIS}/birth_windows.json"],
            _JSON,
            _windows,
            "other windows of the same sweep, valid",
            _unseen,
            names=("checkpoints: expected the window's checkpoint",),
        ),
        "intervention's summary": Reader(
            "`kvjax.open_results`, reuse by `intervene`",
            [f"{_ANALYSIS}/interventions/neurons/steps_{step}.json"],
            _JSON,
            _intervention,
            "other numbers that can be printed",
            _unseen,
            names=(f"steps_{step}.nc",),
        ),
        "netCDF of an intervention": Reader(
            "`kvjax.open_results`: arrays of an intervention",
            [f"{_ANALYSIS}/interventions/neurons/steps_{step}.nc"],
            _BYTES,
            _intervention,
            _DETECTED,
        ),
        "store's manifest": Reader(
            "converted parameters",
            [f"{_ANALYSIS}/converted/manifest.json"],
            _JSON,
            _store,
            "a cache miss: the checkpoint is converted again",
            _a_cache_miss,
        ),
        "measured sums": Reader(
            "reuse of a measured checkpoint",
            [f"{_ANALYSIS}/measured/{step_name(step)}.npz"],
            _BYTES,
            _sums,
            "a cache miss: the checkpoint is measured again",
            _missing,
        ),
        "metrics.jsonl": Reader(
            "a run's own evaluations",
            [f"{RUN}/metrics.jsonl"],
            _LINES,
            _metrics,
            "other rows, each a JSON object",
            _unseen,
        ),
        "metrics.jsonl (resumed)": Reader(
            "`train --resume`: rows up to its step, and the best checkpoint of them",
            [f"{RUN}/metrics.jsonl"],
            _LINES,
            _resumed_metrics,
            "other rows, each with what a resume needs",
            _unseen,
        ),
        "best_checkpoint.json": Reader(
            "finding the best checkpoint",
            [f"{RUN}/best_checkpoint.json"],
            _JSON,
            _best,
            "another step, which is compared with the file's",
            _unseen,
        ),
        "evaluation": Reader(
            "whether an evaluation is current",
            [f"{_ANALYSIS}/evaluation/best.json"],
            _JSON,
            _evaluation,
            "not current: measured again",
            _unseen,
        ),
        "ranking": Reader(
            "whether a ranking is current",
            [RANKING],
            _JSON,
            _ranking,
            "not current: ranked again",
            _unseen,
        ),
    }


READERS = readers_of(STEPS)


def damaged(reader: Reader, name: str, index: int, seed: int, sound: Mapping[str, bytes]) -> tuple[str, bytes]:
    """Makes the damaged input of a number: the file it stands for, and its bytes. The same arguments give the same."""
    rng = random.Random(f"{seed}/{name}/{index}")
    file = reader.files[index % len(reader.files)]
    return file, rng.choice(reader.damages)(rng, sound[file])


def fingerprint(value: Any) -> str:
    """Hashes nested values, so that two are equal if and only if their fingerprints are; NaN equals itself."""
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, pydantic.BaseModel):
        value = value.model_dump()
    elif dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping | list | tuple):
        try:
            yield json.dumps(value, sort_keys=True).encode()  # most values, and much faster than what follows
            return
        except (TypeError, ValueError, RecursionError):
            entries = sorted(value.items(), key=_key_shown) if isinstance(value, Mapping) else enumerate(value)
        yield f"{type(value).__name__}{len(value)}".encode()
        for key, part in entries:
            yield repr(key).encode("utf-8", "backslashreplace")
            yield from _parts(part)
    elif isinstance(value, set | frozenset):
        yield from _parts(sorted(value, key=repr))
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, os.PathLike):
        yield Path(value).name.encode()
    else:
        yield f"{type(value).__name__} {value!r} ".encode("utf-8", "backslashreplace")


def _key_shown(item: tuple[Any, Any]) -> str:
    return repr(item[0])


def refusal_problem(error: InputError, reader: Reader, file: Path) -> str | None:
    """Says what is wrong with a refusal: it has to be one line that names the file."""
    text = str(error)
    if len(text.splitlines()) != 1 or any(ord(character) < 32 for character in text):
        return f"not one printable line: {text!r}"
    if not any(name in text for name in (file.name, *reader.names)):
        return f"the file is not named: {text}"
    return None
