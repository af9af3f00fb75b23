"""Makes and opens probe sets: immutable selections of records that every checkpoint is measured on.

A probe set is three record files and one manifest:

  <stem>.jsonl          the probe records, by split
  <stem>.fit.jsonl      the fit set: `train` records that ablation means and probes are fitted on
  <stem>.sources.jsonl  the source record of every counterfactual probe record, in their order
  <stem>.metadata.json  the manifest: how they were chosen, coverage, difficulty, and hashes

A probe set written by the reference tool has only the records and a metadata file of its own. It is used
as it is; companion files beside it hold the rest, with the manifest in `<stem>.companion.json`.
"""

from __future__ import annotations

import dataclasses
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
    replace_together,
    write_json,
    write_json_lines,
)
from kvjax.artifacts.identity import content_digest
from kvjax.artifacts.layout import ProbeSetLayout
from kvjax.config.benchmark import COUNTERFACTUAL_SPLIT, HELDOUT_SPLIT
from kvjax.errors import misfit, unusable
from kvjax.task.benchmark import Benchmark
from kvjax.task.record_check import check_counterfactual, check_record
from kvjax.task.selection import DIFFICULTY_RULE, Difficulty, assign_difficulty, choose_examples, coverage_counts
from kvjax.task.stream import Record

PROBE_SPLITS = ("validation_iid", HELDOUT_SPLIT, "structural_ood", COUNTERFACTUAL_SPLIT)
FIT_SPLIT = "train"
DEFAULT_EXAMPLES_PER_SPLIT = 96
DEFAULT_FIT_EXAMPLES = 512
DEFAULT_SEED = 17
SCHEMA_VERSION = 1


class Manifest(pydantic.BaseModel):
    """A probe set's metadata file. `content_sha256` covers everything else and the three record files."""

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
        """The files that make it up, the reference tool's metadata included, the manifest last."""
        names = ProbeSetLayout(self.path)
        present = tuple(path for path in (names.manifest, names.companion) if path.is_file())
        return (self.path, names.fit, names.sources, *present)


def generate_probe_set(
    benchmark: Benchmark, path: Path, *, examples_per_split: int, fit_examples: int, seed: int
) -> ProbeSet:
    """Chooses and writes a probe set; existing files are never overwritten.

    Files that an interrupted call left are no probe set: `path` alone may be someone's, with its companions it is ours.

    Raises:
      InputError: the path is taken, or the benchmark lacks a split or has too few records in it.
    """
    _check_suffix(path)
    names = ProbeSetLayout(path)
    interrupted = not names.manifest.exists() and (names.sources.exists() or not path.exists())
    if not interrupted:
        taken = path if path.exists() else names.manifest
        raise unusable(taken, "a path to create (probe sets are immutable; choose another name)", "a file")
    records: list[Record] = []
    added: dict[str, int] = {}
    for split in PROBE_SPLITS:
        pool = benchmark.read_split(split)
        if len(pool) < examples_per_split:
            raise unusable(benchmark.layout.split(split), f"at least {examples_per_split} records", len(pool))
        chosen = choose_examples(pool, examples_per_split, seed=f"{seed}/{split}")
        added[split] = len(chosen) - examples_per_split
        records += chosen
    companions = _choose_companions(benchmark, records, seed, fit_examples)
    _write(path, names.manifest, benchmark, records, companions, seed, added)
    return open_probe_set(path, benchmark)


def own_probe_set(path: Path, benchmark: Benchmark) -> ProbeSet:
    """Opens a run's own probe set at `path`, or makes it with the default settings.

    Files that an interrupted run left without their manifest are not a probe set, and are made anew.
    """
    names = ProbeSetLayout(path)
    if not has_probe_set(path):
        for file in (path, names.fit, names.sources):
            file.unlink(missing_ok=True)
        smallest = min((benchmark.split_sizes.get(split, 0) for split in PROBE_SPLITS), default=0)
        return generate_probe_set(
            benchmark,
            path,
            examples_per_split=max(1, min(DEFAULT_EXAMPLES_PER_SPLIT, smallest)),
            fit_examples=DEFAULT_FIT_EXAMPLES,
            seed=DEFAULT_SEED,
        )
    return open_probe_set(path, benchmark)


def open_probe_set(path: Path, benchmark: Benchmark) -> ProbeSet:
    """Opens the probe set at `path`; one of the reference tool gets its companion files first.

    Raises:
      InputError: a file is missing or was edited, or the set was built from another benchmark.
    """
    _check_suffix(path)
    if not path.is_file():
        raise unusable(path, "a probe set", "no such file")
    names = ProbeSetLayout(path)
    metadata = read_json(names.manifest)
    if not _has_own_manifest(metadata) and not names.companion.exists():
        _adopt(names, metadata, benchmark)
    manifest = frozen_manifest(path)
    if not benchmark.hashes.names(manifest.benchmark_sha256):
        raise unusable(path, f"a probe set of the benchmark in {benchmark.path}", "one built from another benchmark")
    records = benchmark.check_records(read_json_lines(path), path)
    fit = benchmark.check_records(read_json_lines(names.fit), names.fit, manifest.fit_split)
    sources = _check_sources(records, read_json_lines(names.sources), names.sources, benchmark)
    if stray := {record["split"] for record in records} - set(manifest.splits):
        raise unusable(path, f"records of the splits {', '.join(manifest.splits)}", min(stray))
    return ProbeSet(path, manifest, tuple(records), tuple(fit), sources)


def frozen_manifest(path: Path) -> Manifest:
    """Reads the manifest of a probe set, after checking all its files against their hashes.

    Raises:
      InputError: a file is missing or was edited.
    """
    names = ProbeSetLayout(path)
    manifest_file = names.manifest
    metadata = read_json(manifest_file)
    if not _has_own_manifest(metadata):
        manifest_file = names.companion
        metadata = read_json(manifest_file)
    try:
        manifest = Manifest.model_validate(metadata)
    except pydantic.ValidationError as error:
        raise misfit(manifest_file, error, "the manifest of a probe set") from None
    for file, recorded in (
        (path, manifest.records_sha256),
        (names.fit, manifest.fit_sha256),
        (names.sources, manifest.sources_sha256),
    ):
        if not file.is_file():
            raise unusable(file, "a file of the probe set", "no such file")
        if file_sha256(file) != recorded:
            raise unusable(file, f"the content hashed in {manifest_file.name}", "an edited file")
    if content_digest(manifest.model_dump()) != manifest.content_sha256:
        raise unusable(manifest_file, "the content its own hash names", "an edited file")
    return manifest


def _check_sources(
    records: Sequence[Record], documents: Sequence[Any], path: Path, benchmark: Benchmark
) -> dict[str, Record]:
    """Checks the source records of the counterfactual probe records, several of which may have one source."""
    counterfactuals = [record for record in records if record["counterfactual_of"]]
    if len(documents) != len(counterfactuals):
        raise unusable(path, f"{len(counterfactuals)} records, one for each counterfactual", len(documents))
    sources = {}
    for number, (record, document) in enumerate(zip(counterfactuals, documents, strict=True), start=1):
        source = check_record(document, benchmark.vocabulary, benchmark.heldout, f"{path}:{number}")
        if source["sample_id"] != record["counterfactual_of"]:
            expected = f"the source of {record['sample_id']}, {record['counterfactual_of']}"
            raise unusable(f"{path}:{number}", expected, source["sample_id"])
        check_counterfactual(record, source, f"{path}:{number}")
        sources[record["sample_id"]] = source
    return sources


def _has_own_manifest(metadata: Any) -> bool:
    return isinstance(metadata, dict) and "kvjax_probe_set" in metadata


def check_installable(probe: ProbeSet, target: Path) -> None:
    """Raises `InputError` if another probe set than the given one is installed at `target`."""
    if has_probe_set(target) and installed_sha256(target) != probe.manifest.content_sha256:
        raise unusable(target, f"the probe set {probe.path} of this sweep (or `overwrite`)", "another probe set")


def install_probe_set(probe: ProbeSet, target: Path) -> None:
    """Copies a probe set into a run, so that later stages and other people find it there.

    Its manifest is copied last: files without one are not a probe set. The pairs of a replaced probe set are deleted.
    """
    names = ProbeSetLayout(target)
    if has_probe_set(target) and installed_sha256(target) == probe.manifest.content_sha256:
        return
    with replace_together() as files:
        for file in probe.files:
            with files.file(target.parent / file.name.replace(probe.path.stem, target.stem, 1)) as partial:
                shutil.copyfile(file, partial)
        # Pairs first: after any interruption they belong to the probe set beside them, or are made again.
        for stale in (names.pairs_manifest, names.pairs, names.manifest, names.companion):
            stale.unlink(missing_ok=True)


def has_probe_set(path: Path) -> bool:
    """Says whether all of a probe set is at `path`: records and, written last, a manifest."""
    names = ProbeSetLayout(path)
    return names.records.is_file() and (names.manifest.is_file() or names.companion.is_file())


def installed_sha256(path: Path) -> str | None:
    """Reads the hash of its content that a probe set's manifest names; None if there is no manifest that does."""
    names = ProbeSetLayout(path)
    for file in (names.companion, names.manifest):
        document = read_json(file) if file.is_file() else None
        if isinstance(document, dict) and "content_sha256" in document:
            return document["content_sha256"]
    return None


def _adopt(names: ProbeSetLayout, metadata: Any, benchmark: Benchmark) -> None:
    """Checks a probe set of the reference tool against the benchmark and writes its companion files."""
    try:
        seed = int(metadata["seed"])
        num_records = int(metadata["num_records"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise unusable(names.manifest, "the metadata of a probe set (seed, num_records)", repr(error)) from None
    path = names.records
    records = read_json_lines(path)
    if len(records) != num_records:
        raise unusable(path, f"{num_records} records ({names.manifest.name})", len(records))
    by_split: dict[str, dict[str, Record]] = {}
    for number, record in enumerate(benchmark.check_records(records, path), start=1):
        where = f"{path}:{number}"
        split = record["split"]
        if split not in by_split:
            by_split[split] = {known["sample_id"]: known for known in benchmark.read_split(split)}
        if by_split[split].get(record["sample_id"]) != record:
            found = f"{record['sample_id']}, which differs from the benchmark's"
            raise unusable(where, f"a record of the benchmark in {benchmark.path}", found)
    companions = _choose_companions(benchmark, records, seed, DEFAULT_FIT_EXAMPLES)
    _write(path, names.companion, benchmark, records, companions, seed, dict.fromkeys(by_split, 0))


def _choose_companions(
    benchmark: Benchmark, records: Sequence[Record], seed: int, fit_examples: int
) -> tuple[list[Record], list[Record]]:
    """Chooses the fit set and finds the counterfactuals' source records."""
    pool = benchmark.read_split(FIT_SPLIT)
    picked = random.Random(f"{seed}/fit").sample(range(len(pool)), min(fit_examples, len(pool)))
    fit = [pool[index] for index in sorted(picked)]
    return fit, _source_records(benchmark, records)


def _write(
    path: Path,
    manifest_file: Path,
    benchmark: Benchmark,
    records: Sequence[Record],
    companions: tuple[list[Record], list[Record]],
    seed: int,
    added: Mapping[str, int],
) -> None:
    """Writes the files of a probe set together; records that there are already, of the reference tool, stay."""
    fit, sources = companions
    names = ProbeSetLayout(path)
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
        "num_fit_records": len(fit),
    }
    with replace_together() as files:
        write_json_lines(names.fit, fit, replace=files.file)
        write_json_lines(names.sources, sources, replace=files.file)
        if manifest_file == names.manifest:
            write_json_lines(path, records, replace=files.file)
            document["records_sha256"] = files.hash(path).sha256
        else:
            document["records_sha256"] = file_sha256(path)
        document["fit_sha256"] = files.hash(names.fit).sha256
        document["sources_sha256"] = files.hash(names.sources).sha256
        document["content_sha256"] = content_digest(document)
        write_json(manifest_file, Manifest.model_validate(document).model_dump(), replace=files.file)


def _source_records(benchmark: Benchmark, records: Sequence[Record]) -> list[Record]:
    counterfactuals = [record for record in records if record["counterfactual_of"]]
    wanted = [record["counterfactual_of"] for record in counterfactuals]
    splits = sorted({sample_id.rsplit("_", 1)[0] for sample_id in wanted})
    known = {record["sample_id"]: record for split in splits for record in benchmark.read_split(split)}
    missing = [sample_id for sample_id in wanted if sample_id not in known]
    if missing:
        raise unusable(benchmark.path, f"the counterfactuals' source record {missing[0]}", "none")
    for record in counterfactuals:
        where = benchmark.layout.split(record["split"])
        check_counterfactual(record, known[record["counterfactual_of"]], where)
    return [known[sample_id] for sample_id in wanted]


def _check_suffix(path: Path) -> None:
    if path.suffix != ".jsonl":
        raise unusable(path, "a probe set file ending in .jsonl", path.suffix or "no ending")
