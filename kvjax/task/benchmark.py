"""Writes a benchmark directory atomically after its fairness checks, and reads it back with its vocabulary."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvjax.artifacts.files import read_json, read_json_lines, replace_directory, write_json, write_json_lines
from kvjax.artifacts.layout import BenchmarkLayout
from kvjax.config.benchmark import HELDOUT_SPLIT, BenchmarkConfig
from kvjax.errors import InputError, unusable
from kvjax.task.generator import Pair, draw_benchmark
from kvjax.task.stream import EVENT_AXES, SEQUENCE_AXES, Record, replay
from kvjax.task.vocabulary import Vocabulary

BENCHMARK_TYPE = "symbolic_kv_stream"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """An opened benchmark directory. Splits are read only by `read_split`.

    Attributes:
      path: the directory.
      name: the benchmark's name.
      vocabulary: its tokens.
      split_sizes: number of records by split.
      holdout_pairs: the held-out "key:value" pairs.
      sha256: hash of `metadata.json`, which names this benchmark in everything built from it.
    """

    path: Path
    name: str
    vocabulary: Vocabulary
    split_sizes: Mapping[str, int]
    holdout_pairs: frozenset[str]
    sha256: str

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
        try:
            vocabulary = metadata["vocabulary"]
            sizes = {split: int(facts["num_samples"]) for split, facts in metadata["splits"].items()}
            name = str(metadata["name"])
            holdout_pairs = frozenset(metadata["holdout_pairs"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            expected = "name, vocabulary, holdout_pairs and splits with num_samples"
            raise unusable(metadata_path, expected, repr(error)) from None
        if not sizes:
            raise unusable(metadata_path, "at least one split", "none")
        return cls(
            path=path,
            name=name,
            vocabulary=Vocabulary.from_metadata(vocabulary, metadata_path),
            split_sizes=sizes,
            holdout_pairs=holdout_pairs,
            sha256=hashlib.sha256(metadata_path.read_bytes()).hexdigest(),
        )

    @property
    def layout(self) -> BenchmarkLayout:
        """The names of its files."""
        return BenchmarkLayout(self.path)

    def has_config(self, config: BenchmarkConfig) -> bool:
        """Checks whether the metadata records this config."""
        return read_json(self.layout.metadata).get("config") == _recorded_config(config)

    def read_split(self, split: str) -> list[Record]:
        """Reads the records of a split, in file order.

        Raises:
          InputError: the split is missing, damaged or not as long as the metadata says.
        """
        path = self.layout.split(split)
        if split not in self.split_sizes or not path.is_file():
            raise unusable(path, f"the records of split {split}", "no such file")
        records = read_json_lines(path)
        if len(records) != self.split_sizes[split]:
            raise unusable(path, f"{self.split_sizes[split]} records ({self.layout.metadata.name})", len(records))
        for number, record in enumerate(records, start=1):
            check_record_fields(record, f"{path}:{number}")
        return records


def generate_benchmark(config: BenchmarkConfig, output_dir: Path, *, overwrite: bool) -> dict[str, Any]:
    """Draws, checks and writes a benchmark; replaces an existing one only when the new one is complete.

    Returns:
      The metadata written.

    Raises:
      InputError: the directory is taken, the settings cannot work, or a fairness check fails.
    """
    taken = output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir()))
    if taken and not overwrite:
        raise unusable(output_dir, "a directory to create (or `overwrite`)", "an existing one")
    metadata_file = BenchmarkLayout(output_dir).metadata
    if taken and not metadata_file.is_file():
        raise unusable(output_dir, "an earlier benchmark to overwrite", f"a path without {metadata_file.name}")
    vocabulary, heldout, splits = draw_benchmark(config)
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


def check_record_fields(record: Any, where: object) -> None:
    """Raises `InputError` unless a document has every field of a record that the code reads, of the right kind."""
    kinds = {
        "sample_id": str,
        "split": str,
        "tokens": list,
        "token_ids": list,
        "axes": dict,
        "writes": list,
        "query_plan": list,
        "query_events": list,
        "exact_sequence_signature": str,
    }
    if not isinstance(record, dict):
        raise unusable(where, "a benchmark record", type(record).__name__)
    for name, kind in kinds.items():
        if not isinstance(record.get(name), kind):
            raise unusable(where, f"a benchmark record with a {kind.__name__} {name}", type(record.get(name)).__name__)
    missing = [axis for axis in SEQUENCE_AXES if not isinstance(record["axes"].get(axis), int)]
    if missing or not record["query_events"]:
        raise unusable(where, "a benchmark record with axes and query_events", f"no {(missing or ['query_events'])[0]}")
    for event in record["query_events"]:
        if not isinstance(event, dict) or not all(isinstance(event.get(axis), int) for axis in EVENT_AXES):
            raise unusable(where, f"query_events with integer {', '.join(EVENT_AXES)}", event)


def check_record(record: Record, vocabulary: Vocabulary, where: object) -> None:
    """Raises `InputError` unless replaying a record's tokens gives its ids and read events."""
    check_record_fields(record, where)
    name = f"{where}: {record['sample_id']}"
    try:
        ids = [vocabulary.id_of[token] for token in record["tokens"]]
        if ids != record["token_ids"]:
            index, expected, found = _first_difference(ids, record["token_ids"])
            raise unusable(name, f"token_ids of the benchmark's vocabulary ({expected} at position {index})", found)
        try:
            reads = replay(record["tokens"])
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        recorded = [
            (
                event["key"],
                event["answer_value"],
                event["positions"]["answer"],
                event["support_positions"]["value"],
            )
            for event in record["query_events"]
        ]
    except (KeyError, TypeError) as error:
        raise unusable(name, "a record of this benchmark", repr(error)) from None
    replayed = [(read.key, read.answer, read.answer_position, read.support_value_position) for read in reads]
    if recorded != replayed:
        index, expected, found = _first_difference(replayed, recorded)
        raise unusable(name, f"query_events as replaying the tokens gives them (read {index}: {expected})", found)


def _first_difference(expected: Sequence[Any], found: Sequence[Any]) -> tuple[int, Any, Any]:
    """Finds the first index at which two different sequences differ, and both entries; a missing one is None."""
    pairs = enumerate(itertools.zip_longest(expected, found))
    return next((index, a, b) for index, (a, b) in pairs if a != b)


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
