"""The probe set: a fixed, immutable selection of records that every checkpoint is measured on.

A probe set is three record files and one manifest:

  <stem>.jsonl          the probe records, by split
  <stem>.fit.jsonl      the fit set: `train` records that ablation means and probes are fitted on
  <stem>.sources.jsonl  the source record of every counterfactual probe record, in their order
  <stem>.metadata.json  the manifest: how they were chosen, coverage, difficulty, and the hash of it all

A probe set written by the reference tool has only the records and a metadata file of its own. It is used as it is;
what it lacks goes into companion files beside it, with the manifest in `<stem>.companion.json`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic

from kvjax.artifacts.files import (
    file_sha256,
    read_json,
    read_json_lines,
    replace_file,
    write_json,
    write_json_lines,
)
from kvjax.config import COUNTERFACTUAL_SPLIT, HELDOUT_SPLIT
from kvjax.errors import unusable
from kvjax.task.benchmark import Benchmark, check_record
from kvjax.task.stream import EVENT_AXES, SEQUENCE_AXES, Record

PROBE_SPLITS = ("validation_iid", HELDOUT_SPLIT, "structural_ood", COUNTERFACTUAL_SPLIT)
FIT_SPLIT = "train"
COVERED_AXES = ("active_keys", *EVENT_AXES)
EVENTS_PER_VALUE = 8
SCHEMA_VERSION = 1

DIFFICULTY_RULE = (
    "Within each split, examples are ordered by the mean tokens_since_support of their reads, then by the largest, "
    "then by sample_id; the upper half is hard, the rest easy."
)

Difficulty = Literal["easy", "hard"]


class Manifest(pydantic.BaseModel):
    """What a probe set's metadata file holds. `content_sha256` covers everything else and the three record files."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    kvjax_probe_set: Literal[1]
    benchmark_name: str
    benchmark_sha256: str
    seed: int
    splits: list[str]
    split_counts: dict[str, int]
    added_for_coverage: dict[str, int]
    coverage: dict[str, dict[str, dict[str, int]]]
    difficulty_rule: str
    difficulty: dict[str, Difficulty]
    fit_split: str
    num_fit_records: int
    records_sha256: str
    fit_sha256: str
    sources_sha256: str
    content_sha256: str


@dataclasses.dataclass(frozen=True)
class ProbeSet:
    """An opened probe set, checked against its hash and its benchmark.

    Attributes:
      path: the records file.
      manifest: how it was chosen, and its hashes.
      records: the probe records, in file order.
      fit_records: the fit set.
      sources: sample_id of a counterfactual probe record -> its source record.
    """

    path: Path
    manifest: Manifest
    records: tuple[Record, ...]
    fit_records: tuple[Record, ...]
    sources: Mapping[str, Record]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that make it up, those of the reference tool included."""
        extra = (self.path.with_suffix(".metadata.json"), self.path.with_suffix(".companion.json"))
        present = tuple(path for path in extra if path.is_file())
        return (self.path, fit_path(self.path), sources_path(self.path), *present)


def fit_path(path: Path) -> Path:
    """Returns where the fit set of the probe set at `path` lies."""
    return path.with_suffix(".fit.jsonl")


def sources_path(path: Path) -> Path:
    """Returns where the counterfactuals' source records of the probe set at `path` lie."""
    return path.with_suffix(".sources.jsonl")


def generate_probe_set(
    benchmark: Benchmark, path: Path, *, examples_per_split: int, fit_examples: int, seed: int
) -> ProbeSet:
    """Chooses and writes a probe set; what exists is never overwritten.

    Raises:
      InputError: the path is taken, or the benchmark lacks a split or has too few records in it.
    """
    _check_suffix(path)
    taken = [p for p in (path, path.with_suffix(".metadata.json"), fit_path(path)) if p.exists()]
    if taken:
        raise unusable(taken[0], "a path to create (probe sets are immutable; choose another name)", "a file")
    records: list[Record] = []
    added: dict[str, int] = {}
    for split in PROBE_SPLITS:
        pool = benchmark.read_split(split)
        if len(pool) < examples_per_split:
            raise unusable(f"{benchmark.path}/{split}.jsonl", f"at least {examples_per_split} records", len(pool))
        chosen = choose_examples(pool, examples_per_split, seed=f"{seed}/{split}")
        added[split] = len(chosen) - examples_per_split
        records += chosen
    for record in records:
        check_record(record, benchmark.vocabulary, benchmark.path)
    write_json_lines(path, records)
    _complete(path, path.with_suffix(".metadata.json"), benchmark, records, seed, fit_examples, added)
    return open_probe_set(path, benchmark)


def open_probe_set(path: Path, benchmark: Benchmark) -> ProbeSet:
    """Returns the probe set at `path`; one the reference tool wrote gets its companion files first.

    Raises:
      InputError: a file is missing or was edited, or the set was built from another benchmark.
    """
    _check_suffix(path)
    metadata_path = path.with_suffix(".metadata.json")
    if not path.is_file():
        raise unusable(path, "a probe set", "no such file")
    metadata = read_json(metadata_path)
    if isinstance(metadata, dict) and "kvjax_probe_set" in metadata:
        manifest_path = metadata_path
    else:
        manifest_path = path.with_suffix(".companion.json")
        if not manifest_path.exists():
            _adopt(path, metadata_path, metadata, manifest_path, benchmark)
        metadata = read_json(manifest_path)
    try:
        manifest = Manifest.model_validate(metadata)
    except pydantic.ValidationError as error:
        raise unusable(manifest_path, "the manifest of a probe set", error.errors()[0]["msg"]) from None
    for file, recorded in (
        (path, manifest.records_sha256),
        (fit_path(path), manifest.fit_sha256),
        (sources_path(path), manifest.sources_sha256),
    ):
        if not file.is_file():
            raise unusable(file, "a file of the probe set", "no such file")
        if file_sha256(file) != recorded:
            raise unusable(file, f"the content hashed in {manifest_path.name}", "an edited file")
    if _content_sha256(manifest.model_dump()) != manifest.content_sha256:
        raise unusable(manifest_path, "the content its own hash names", "an edited file")
    if manifest.benchmark_sha256 != benchmark.sha256:
        raise unusable(path, f"a probe set of the benchmark in {benchmark.path}", "one built from another benchmark")
    records = read_json_lines(path)
    counterfactuals = [record["sample_id"] for record in records if record["counterfactual_of"]]
    sources = dict(zip(counterfactuals, read_json_lines(sources_path(path)), strict=True))
    return ProbeSet(path, manifest, tuple(records), tuple(read_json_lines(fit_path(path))), sources)


def install_probe_set(probe: ProbeSet, folder: Path, *, replace: bool) -> None:
    """Copies a probe set into a run's analysis folder, so that later stages and other people find it there.

    Raises:
      InputError: another probe set lies there, and `replace` is not set.
    """
    target = folder / "probe_set.jsonl"
    if target.exists() and file_sha256(target) == probe.manifest.records_sha256:
        return
    if target.exists() and not replace:
        raise unusable(target, f"the probe set {probe.path} of this sweep (or --overwrite)", "another probe set")
    for suffix in (".metadata.json", ".companion.json"):
        target.with_suffix(suffix).unlink(missing_ok=True)
    for file in probe.files:
        with replace_file(folder / file.name.replace(probe.path.stem, target.stem, 1)) as partial:
            shutil.copyfile(file, partial)


def choose_examples(pool: Sequence[Record], count: int, *, seed: str) -> list[Record]:
    """Returns `count` records that cover a split: round-robin over axis signatures, then topped up.

    After the round-robin, records are added until every value of `COVERED_AXES` in the pool has at least
    `EVENTS_PER_VALUE` read events or all there are; then the last round-robin picks that coverage can spare make room.
    More than `count` records come back only where coverage needs them.
    """
    rng = random.Random(seed)
    groups: dict[tuple[int, ...], list[Record]] = {}
    for record in pool:
        groups.setdefault(tuple(record["axes"][axis] for axis in SEQUENCE_AXES), []).append(record)
    queues = [rng.sample(groups[signature], len(groups[signature])) for signature in sorted(groups)]
    order = [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]

    available = Counter(label for record in pool for label in _event_labels(record))
    required = {label: min(EVENTS_PER_VALUE, total) for label, total in available.items()}
    chosen = order[:count]
    have = Counter(label for record in chosen for label in _event_labels(record))
    reserve = order[count:]
    while deficit := {label: need - have[label] for label, need in required.items() if have[label] < need}:
        # One that serves the most of what is missing; the earliest in the round-robin among equals.
        best = max(
            range(len(reserve)),
            key=lambda i: (sum(label in deficit for label in _event_labels(reserve[i])), -i),
        )
        have.update(_event_labels(reserve[best]))
        chosen.append(reserve.pop(best))

    for index in reversed(range(count)):
        if len(chosen) == count:
            break
        labels = Counter(_event_labels(chosen[index]))
        if all(have[label] - labels[label] >= required[label] for label in labels):
            have.subtract(labels)
            del chosen[index]
    return chosen


def assign_difficulty(records: Sequence[Record]) -> dict[str, Difficulty]:
    """Returns sample_id -> easy or hard, by `DIFFICULTY_RULE`."""
    by_split: dict[str, list[Record]] = {}
    for record in records:
        by_split.setdefault(record["split"], []).append(record)

    def distance(record: Record) -> tuple[float, int, str]:
        distances = [event["tokens_since_support"] for event in record["query_events"]]
        return sum(distances) / len(distances), max(distances), record["sample_id"]

    tags: dict[str, Difficulty] = {}
    for members in by_split.values():
        ordered = sorted(members, key=distance)
        for rank, record in enumerate(ordered):
            tags[record["sample_id"]] = "hard" if rank >= (len(ordered) + 1) // 2 else "easy"
    return tags


def coverage_counts(records: Sequence[Record]) -> dict[str, dict[str, dict[str, int]]]:
    """Returns split -> axis -> value -> number of read events, for every axis a slice can be taken on."""
    counts: dict[str, dict[str, Counter[int]]] = {}
    for record in records:
        axes = counts.setdefault(record["split"], {axis: Counter() for axis in (*SEQUENCE_AXES, *EVENT_AXES)})
        for event in record["query_events"]:
            for axis in SEQUENCE_AXES:
                axes[axis][record["axes"][axis]] += 1
            for axis in EVENT_AXES:
                axes[axis][event[axis]] += 1
    return {
        split: {axis: {str(value): counter[value] for value in sorted(counter)} for axis, counter in axes.items()}
        for split, axes in counts.items()
    }


def _event_labels(record: Record) -> list[tuple[str, int]]:
    return [
        (axis, record["axes"][axis] if axis == "active_keys" else event[axis])
        for event in record["query_events"]
        for axis in COVERED_AXES
    ]


def _adopt(path: Path, metadata_path: Path, metadata: Any, manifest_path: Path, benchmark: Benchmark) -> None:
    """Checks a probe set of the reference tool against the benchmark and writes what it lacks beside it."""
    try:
        seed = int(metadata["seed"])
        num_records = int(metadata["num_records"])
    except (KeyError, TypeError, ValueError) as error:
        raise unusable(metadata_path, "the metadata of a probe set (seed, num_records)", repr(error)) from None
    records = read_json_lines(path)
    if len(records) != num_records:
        raise unusable(path, f"{num_records} records ({metadata_path.name})", len(records))
    by_split: dict[str, dict[str, Record]] = {}
    for number, record in enumerate(records, start=1):
        where = f"{path}:{number}"
        if not isinstance(record, dict) or not {"split", "sample_id", "query_events"} <= record.keys():
            raise unusable(where, "a benchmark record", "an object without split, sample_id and query_events")
        split = record["split"]
        if split not in by_split:
            by_split[split] = {known["sample_id"]: known for known in benchmark.read_split(split)}
        if by_split[split].get(record["sample_id"]) != record:
            raise unusable(
                where,
                f"a record of the benchmark in {benchmark.path}",
                f"{record['sample_id']}, not in it as such",
            )
        check_record(record, benchmark.vocabulary, where)
    added = dict.fromkeys(by_split, 0)
    _complete(path, manifest_path, benchmark, records, seed, fit_examples=512, added=added)


def _complete(
    path: Path,
    manifest_path: Path,
    benchmark: Benchmark,
    records: Sequence[Record],
    seed: int,
    fit_examples: int,
    added: Mapping[str, int],
) -> None:
    """Writes the fit set, the source records and, last, the manifest that makes them a probe set."""
    write_json_lines(sources_path(path), _source_records(benchmark, records))
    pool = benchmark.read_split(FIT_SPLIT)
    picked = random.Random(f"{seed}/fit").sample(range(len(pool)), min(fit_examples, len(pool)))
    write_json_lines(fit_path(path), [pool[index] for index in sorted(picked)])
    counts = Counter(record["split"] for record in records)
    document = {
        "kvjax_probe_set": SCHEMA_VERSION,
        "benchmark_name": benchmark.name,
        "benchmark_sha256": benchmark.sha256,
        "seed": seed,
        "splits": list(counts),
        "split_counts": dict(counts),
        "added_for_coverage": dict(added),
        "coverage": coverage_counts(records),
        "difficulty_rule": DIFFICULTY_RULE,
        "difficulty": assign_difficulty(records),
        "fit_split": FIT_SPLIT,
        "num_fit_records": len(picked),
        "records_sha256": file_sha256(path),
        "fit_sha256": file_sha256(fit_path(path)),
        "sources_sha256": file_sha256(sources_path(path)),
    }
    document["content_sha256"] = _content_sha256(document)
    write_json(manifest_path, Manifest.model_validate(document).model_dump())


def _source_records(benchmark: Benchmark, records: Sequence[Record]) -> list[Record]:
    wanted = [record["counterfactual_of"] for record in records if record["counterfactual_of"]]
    splits = sorted({sample_id.rsplit("_", 1)[0] for sample_id in wanted})
    known = {record["sample_id"]: record for split in splits for record in benchmark.read_split(split)}
    missing = [sample_id for sample_id in wanted if sample_id not in known]
    if missing:
        raise unusable(benchmark.path, f"the counterfactuals' source record {missing[0]}", "none")
    return [known[sample_id] for sample_id in wanted]


def _content_sha256(document: Mapping[str, Any]) -> str:
    covered = {name: value for name, value in document.items() if name != "content_sha256"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def _check_suffix(path: Path) -> None:
    if path.suffix != ".jsonl":
        raise unusable(path, "a probe set file ending in .jsonl", path.suffix or "no ending")
