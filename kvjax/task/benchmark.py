"""Writes a benchmark directory atomically after its fairness checks, and reads it back with its vocabulary."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvjax.artifacts.benchmark_hash import BenchmarkHashes
from kvjax.artifacts.files import HashedFile, file_sha256, read_json, replace_directory, write_json, write_json_lines
from kvjax.artifacts.layout import BenchmarkLayout
from kvjax.artifacts.partials import remove_abandoned
from kvjax.config.benchmark import HELDOUT_SPLIT, BenchmarkConfig
from kvjax.config.json_text import parse_json_lines, without_garbage_collection
from kvjax.errors import InputError, one_line, unusable
from kvjax.task.generator import Pair, draw_benchmark
from kvjax.task.record_check import check_record
from kvjax.task.stream import Record
from kvjax.task.vocabulary import Vocabulary

BENCHMARK_TYPE = "symbolic_kv_stream"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """An opened benchmark directory. Splits are read only by `read_split`.

    Attributes:
      path: the directory.
      name: the benchmark's name.
      vocabulary: its tokens.
      splits: what the metadata says of each split.
      holdout_pairs: the held-out "key:value" pairs.
    """

    path: Path
    name: str
    vocabulary: Vocabulary
    splits: Mapping[str, Mapping[str, Any]]
    holdout_pairs: frozenset[str]

    @classmethod
    def open(cls, path: Path) -> Benchmark:
        """Opens the benchmark in a directory.

        Raises:
          InputError: the directory holds no benchmark, or its metadata is damaged.
        """
        metadata_path = BenchmarkLayout(path).metadata
        if not metadata_path.is_file():
            raise unusable(path, f"a benchmark directory with {metadata_path.name}", "none")
        metadata = read_json(metadata_path)
        if not isinstance(metadata, dict) or metadata.get("benchmark_type") != BENCHMARK_TYPE:
            found = metadata.get("benchmark_type") if isinstance(metadata, dict) else type(metadata).__name__
            raise unusable(metadata_path, f"benchmark_type {BENCHMARK_TYPE!r}", found)
        missing = [name for name in ("name", "vocabulary", "holdout_pairs", "splits") if name not in metadata]
        if missing:
            raise unusable(metadata_path, "name, vocabulary, holdout_pairs and splits", f"no {missing[0]}")
        vocabulary = Vocabulary.from_metadata(metadata["vocabulary"], metadata_path)
        return cls(
            path=path,
            name=str(metadata["name"]),
            vocabulary=vocabulary,
            splits=_checked_splits(metadata["splits"], metadata_path),
            holdout_pairs=_checked_pairs(metadata["holdout_pairs"], vocabulary, metadata_path),
        )

    @property
    def layout(self) -> BenchmarkLayout:
        """The names of its files."""
        return BenchmarkLayout(self.path)

    @functools.cached_property
    def hashes(self) -> BenchmarkHashes:
        """The hashes by which results name this benchmark."""
        return BenchmarkHashes.of(self.path)

    @property
    def sha256(self) -> str:
        """The hash of its metadata and splits, which names it in everything built from it."""
        return self.hashes.sha256

    @functools.cached_property
    def split_sizes(self) -> dict[str, int]:
        """Number of records by split."""
        return {split: facts["num_samples"] for split, facts in self.splits.items()}

    @functools.cached_property
    def heldout(self) -> frozenset[Pair]:
        """The held-out (key, value) pairs."""
        return frozenset(_as_pair(pair) for pair in self.holdout_pairs)

    def has_config(self, config: BenchmarkConfig) -> bool:
        """Checks whether the metadata records this config."""
        return read_json(self.layout.metadata).get("config") == _recorded_config(config)

    def check_records(self, documents: Sequence[Any], path: Path, split: str | None = None) -> list[Record]:
        """Checks the records of a file whole, each against its own tokens.

        Args:
          documents: the file's lines.
          path: the file, for errors.
          split: the split that all must be of; None if any will do.

        Raises:
          InputError: a record is damaged or stands twice; the error names its line.
        """
        records, lines = [], dict[str, int]()
        with without_garbage_collection():
            for number, document in enumerate(documents, start=1):
                where = f"{path}:{number}"
                record = check_record(document, self.vocabulary, self.heldout, where, split=split)
                if (earlier := lines.setdefault(record["sample_id"], number)) != number:
                    raise unusable(where, "a sample_id of its own", f"{record['sample_id']}, that of line {earlier}")
                records.append(record)
        return records

    def read_split(self, split: str) -> list[Record]:
        """Reads the records of a split, in file order, and checks all of it.

        Raises:
          InputError: the split is missing, damaged, empty, or not what the metadata says.
        """
        path, metadata = self.layout.split(split), self.layout.metadata.name
        if split not in self.splits or not path.is_file():
            raise unusable(path, f"the records of split {split}", "no such file")
        facts, file = self.splits[split], HashedFile.read(path, f"the records of split {split}")
        documents = parse_json_lines(file.content, path)
        if len(documents) != facts["num_samples"]:
            raise unusable(path, f"{facts['num_samples']} records ({metadata})", len(documents))
        if not documents:
            raise unusable(path, "at least one record", "none")
        records = self.check_records(documents, path, split)
        for name, found in _split_facts(records).items():
            if facts.get(name, found) != found:
                raise unusable(path, f"{name} {facts[name]} ({metadata})", found)
        if facts.get("sha256", file.sha256) != file.sha256:
            expected = f"the file that {metadata} records, SHA-256 {facts['sha256'][:12]}"
            raise unusable(path, f"{expected} (generate the benchmark again)", f"SHA-256 {file.sha256[:12]}")
        return records


def _checked_splits(splits: Any, where: Path) -> dict[str, dict[str, Any]]:
    if not isinstance(splits, dict) or not splits:
        raise unusable(where, "at least one split", one_line(splits) if splits else "none")
    for split, facts in splits.items():
        number = facts.get("num_samples") if isinstance(facts, dict) else None
        if type(number) is not int or number < 0:
            raise unusable(where, f"splits.{split} with a whole number num_samples", one_line(facts))
        if not isinstance(facts.get("sha256", ""), str):
            raise unusable(where, f"splits.{split}.sha256 to be a text", facts["sha256"])
    return splits


def _checked_pairs(pairs: Any, vocabulary: Vocabulary, where: Path) -> frozenset[str]:
    if not isinstance(pairs, list):
        raise unusable(where, 'holdout_pairs, a list of texts "key:value"', type(pairs).__name__)
    keys, values = frozenset(vocabulary.key_tokens), frozenset(vocabulary.value_tokens)
    for pair in pairs:
        key, value = _as_pair(pair) if isinstance(pair, str) else ("", "")
        if key not in keys or value not in values:
            raise unusable(where, 'holdout_pairs, each a text "key:value" of the vocabulary', one_line(pair))
    return frozenset(pairs)


def _as_pair(text: str) -> Pair:
    key, _, value = text.partition(":")
    return key, value


def generate_benchmark(
    config: BenchmarkConfig, output_dir: Path, *, overwrite: bool, source: str | Path = "benchmark config"
) -> dict[str, Any]:
    """Draws, checks and writes a benchmark; replaces an existing one only when the new one is complete.

    Args:
      config: what to draw.
      output_dir: where to write it.
      overwrite: whether to replace a benchmark that is there.
      source: where the config comes from, for errors.

    Returns:
      The metadata written.

    Raises:
      InputError: the directory is taken, the settings cannot work, or a fairness check fails.
    """
    remove_abandoned(output_dir.resolve().parent)  # of a killed call, also if this one is refused
    taken = output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir()))
    if taken and not overwrite:
        raise unusable(output_dir, "a directory to create (or `overwrite`)", "an existing one")
    metadata_file = BenchmarkLayout(output_dir).metadata
    if taken and not metadata_file.is_file():
        raise unusable(output_dir, "an earlier benchmark to overwrite", f"a path without {metadata_file.name}")
    try:
        vocabulary, heldout, splits = draw_benchmark(config)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    diagnostics = {
        "heuristics": {split: heuristic_accuracies(records) for split, records in splits.items()},
        "overlap": _overlap(splits),
        "repeats": _repeats(splits),
        "holdout_leakage": {split: _holdout_use(records, heldout) for split, records in splits.items()},
    }
    check_diagnostics(diagnostics, config.heuristic_max_accuracy)
    metadata = {
        "benchmark_type": BENCHMARK_TYPE,
        "name": config.name,
        "seed": config.seed,
        "vocabulary": vocabulary.to_metadata(),
        "holdout_pairs": sorted(f"{key}:{value}" for key, value in heldout),
        "splits": {split: _split_facts(records) for split, records in splits.items()},
        "diagnostics": diagnostics,
        "config": _recorded_config(config),
    }
    with replace_directory(output_dir) as partial:
        written = BenchmarkLayout(partial)
        for split, records in splits.items():
            write_json_lines(written.split(split), records)
            # The hash of the metadata, which names the benchmark, so covers the records too.
            metadata["splits"][split]["sha256"] = file_sha256(written.split(split))
        write_json(written.metadata, metadata)
    return metadata


def heuristic_accuracies(records: Sequence[Record]) -> dict[str, float]:
    """Measures the accuracy of three shortcuts that look up nothing.

    - `last_value_before_query`: the last value token before the read.
    - `first_value_for_key`: the value of the key's first write.
    - `most_frequent_value_before_query`: the value written most often before the read, the first by name among equals.
    """
    names = ("first_value_for_key", "last_value_before_query", "most_frequent_value_before_query")
    right = dict.fromkeys(names, 0)
    total = 0
    for record in records:
        tokens = record["tokens"]
        first: dict[str, str] = {}
        counts: Counter[str] = Counter()
        for at in range(1, len(tokens) - 1, 3):
            op, key, value = tokens[at : at + 3]
            if op == "R":
                total += 1
                right["last_value_before_query"] += value == tokens[at - 1]
                right["first_value_for_key"] += value == first[key]
                most_frequent = min((-count, written) for written, count in counts.items())[1]
                right["most_frequent_value_before_query"] += value == most_frequent
            else:
                first.setdefault(key, value)
                counts[value] += 1
    return {name: right[name] / total for name in names}


def check_diagnostics(diagnostics: Mapping[str, Any], heuristic_limit: float) -> None:
    """Raises `InputError` if a benchmark's diagnostics break a rule of a fair test."""
    for split, accuracies in diagnostics["heuristics"].items():
        for name, accuracy in accuracies.items():
            if accuracy > heuristic_limit:
                raise InputError(
                    f"{split}: expected heuristic {name} at or below {heuristic_limit}; found {accuracy:.3f}"
                )
    for name in ("overlap", "repeats"):
        for kind, counts in diagnostics[name].items():
            for where, count in counts.items():
                if count:
                    raise InputError(f"{where}: expected no {name} of {kind}; found {count}")
    for split, use in diagnostics["holdout_leakage"].items():
        if split != HELDOUT_SPLIT and use["heldout_pair_uses"]:
            raise InputError(f"{split}: expected no held-out pairs; found {use['heldout_pair_uses']}")
        if split == HELDOUT_SPLIT and use["answer_heldout_count"] != use["total_query_events"]:
            raise InputError(
                f"{split}: expected every answer pair held out; found {use['answer_heldout_count']} "
                f"of {use['total_query_events']}"
            )


def _recorded_config(config: BenchmarkConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"output_dir"})  # a benchmark may be moved


_SIGNATURES = {"exact_sequence": "exact_sequence_signature", "latent_program": "latent_program_signature"}


def _overlap(splits: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, int]]:
    result = {}
    for kind, field in _SIGNATURES.items():
        signatures = {split: {record[field] for record in records} for split, records in splits.items()}
        result[kind] = {f"{a}__{b}": len(signatures[a] & signatures[b]) for a, b in itertools.combinations(splits, 2)}
    return result


def _repeats(splits: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, int]]:
    return {
        kind: {split: len(records) - len({record[field] for record in records}) for split, records in splits.items()}
        for kind, field in _SIGNATURES.items()
    }


def _holdout_use(records: Sequence[Record], heldout: frozenset[Pair]) -> dict[str, int]:
    events = [event for record in records for event in record["query_events"]]
    return {
        "answer_heldout_count": sum((event["key"], event["answer_value"]) in heldout for event in events),
        "heldout_pair_uses": sum(
            (write["key"], write["value"]) in heldout for record in records for write in record["writes"]
        ),
        "total_query_events": len(events),
    }


def _split_facts(records: Sequence[Record]) -> dict[str, int]:
    lengths = [record["axes"]["context_tokens"] for record in records]
    return {
        "num_samples": len(records),
        "num_query_events": sum(len(record["query_events"]) for record in records),
        "min_context_tokens": min(lengths),
        "max_context_tokens": max(lengths),
    }
