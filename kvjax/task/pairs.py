"""Chooses pairs of clean and corrupted streams from a probe set, freezes them beside it, and opens them again.

  <stem>.pairs.jsonl          every pair, by kind
  <stem>.pairs.metadata.json  the manifest: how they were chosen, counts, and hashes

The choice depends on the probe set's content and the seed alone, so a copy of a probe set gets the same pairs.

A pair is measured on every read whose answer changes, not on the target read alone: a changed write changes all reads
that return it, and later reads see the answers of earlier ones. The target is the read that the corruption is for.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pydantic

from kvjax.artifacts.files import file_sha256, read_json, read_json_lines, write_json, write_json_lines
from kvjax.artifacts.identity import content_digest
from kvjax.artifacts.layout import ProbeSetLayout
from kvjax.errors import InputError, misfit, one_line, unusable
from kvjax.task.benchmark import Benchmark
from kvjax.task.corruption import PAIR_KINDS, corrupt, difference
from kvjax.task.probe_set import ProbeSet
from kvjax.task.stream import Program, Record, build_record, program_of
from kvjax.task.vocabulary import Vocabulary

DEFAULT_PAIRS_PER_KIND = 96
DEFAULT_SEED = 17
SCHEMA_VERSION = 1

_FROZEN = pydantic.ConfigDict(extra="forbid", frozen=True)


class PairRead(pydantic.BaseModel):
    """One read of a pair: its prediction position, and its answer in the clean and in the corrupted stream."""

    model_config = _FROZEN

    query_index: int
    prediction_position: int
    clean_answer: str
    corrupted_answer: str
    answer_changes: bool


class StreamPair(pydantic.BaseModel):
    """A clean stream and a corrupted one of the same length.

    Attributes:
      pair_id: its name, unique in the pair set.
      kind: one of `PAIR_KINDS`.
      split: of its clean record.
      clean_id: sample_id of the record whose stream is the clean one.
      corrupted_id: sample_id of the record whose stream is the corrupted one; None if there is no such record.
      target_read: query_index of the read that the corruption is for.
      reads: every read, in order.
      changed_inputs: positions of the tokens that were changed, up to the last affected prediction position.
      changed_answers: positions of answers up to there that changed with them.
      position_roles: one of `PAIR_ROLES` for every position; None after the last affected prediction position.
    """

    model_config = _FROZEN

    pair_id: str
    kind: Literal["value", "query", "swap", "stale"]
    split: str
    clean_id: str
    corrupted_id: str | None
    target_read: int
    clean_tokens: list[str]
    clean_token_ids: list[int]
    corrupted_tokens: list[str]
    corrupted_token_ids: list[int]
    reads: list[PairRead]
    changed_inputs: list[int]
    changed_answers: list[int]
    position_roles: list[str | None]


class PairManifest(pydantic.BaseModel):
    """The metadata file of a pair set. `content_sha256` covers everything else and the pairs."""

    model_config = _FROZEN

    kvjax_pairs: Literal[1]
    benchmark_sha256: str
    probe_set_sha256: str
    seed: int
    pairs_per_kind: int
    pair_counts: dict[str, dict[str, int]]
    affected_reads: dict[str, int]
    pairs_sha256: str
    content_sha256: str


@dataclasses.dataclass(frozen=True)
class PairSet:
    """An opened pair set, checked against its hashes, its probe set and a replay of every stream.

    Attributes:
      path: the file of pairs.
      manifest: how they were chosen, and hashes.
      pairs: by kind, in the order of `PAIR_KINDS`.
    """

    path: Path
    manifest: PairManifest
    pairs: tuple[StreamPair, ...]

    def of_kind(self, kind: str) -> tuple[StreamPair, ...]:
        """Lists the pairs of one kind."""
        return tuple(pair for pair in self.pairs if pair.kind == kind)


def generate_pairs(
    probe: ProbeSet, benchmark: Benchmark, *, pairs_per_kind: int = DEFAULT_PAIRS_PER_KIND, seed: int = DEFAULT_SEED
) -> PairSet:
    """Makes and writes the pairs of a probe set; existing files are never overwritten.

    Splits take turns, so each gives its share; if one runs out, the others fill in. In a split, pairs whose corrupted
    streams break the fewest rules of the benchmark come first. A kind has fewer pairs than asked for if the probe set
    allows no more; the manifest holds the counts.

    Raises:
      InputError: the pairs exist, or the probe set allows no pair of some kind.
    """
    if pairs_per_kind < 1:
        raise unusable("pairs_per_kind", "at least 1", pairs_per_kind)
    names = ProbeSetLayout(probe.path)
    path, manifest_path = names.pairs, names.pairs_manifest
    for taken in (path, manifest_path):
        if taken.exists():
            raise unusable(taken, "a path to create (pairs are immutable)", "a file")
    pairs: list[StreamPair] = []
    for kind in PAIR_KINDS:
        turns = _take_turns([_split_pairs(kind, split, probe, benchmark, seed) for split in probe.manifest.splits])
        drawn = list(itertools.islice(turns, pairs_per_kind))
        if not drawn:
            raise unusable(probe.path, f"records that allow a pair of kind {kind}", "none")
        pairs += [pair.model_copy(update={"pair_id": f"{kind}_{index:06d}"}) for index, pair in enumerate(drawn)]
    write_json_lines(path, (pair.model_dump() for pair in pairs))
    document = {
        "kvjax_pairs": SCHEMA_VERSION,
        "benchmark_sha256": benchmark.sha256,
        "probe_set_sha256": probe.manifest.content_sha256,
        "seed": seed,
        "pairs_per_kind": pairs_per_kind,
        "pair_counts": {kind: dict(Counter(pair.split for pair in pairs if pair.kind == kind)) for kind in PAIR_KINDS},
        "affected_reads": {
            kind: sum(read.answer_changes for pair in pairs if pair.kind == kind for read in pair.reads)
            for kind in PAIR_KINDS
        },
        "pairs_sha256": file_sha256(path),
    }
    document["content_sha256"] = content_digest(document)
    write_json(manifest_path, PairManifest.model_validate(document).model_dump())
    return open_pairs(probe, benchmark)


def own_pairs(probe: ProbeSet, benchmark: Benchmark) -> PairSet:
    """Opens the pairs beside a probe set, or makes them with the default settings.

    Pairs that an interrupted run left without their manifest are made anew.
    """
    names = ProbeSetLayout(probe.path)
    if names.pairs_manifest.is_file():
        return open_pairs(probe, benchmark)
    names.pairs.unlink(missing_ok=True)
    return generate_pairs(probe, benchmark)


def open_pairs(probe: ProbeSet, benchmark: Benchmark) -> PairSet:
    """Opens the pairs beside a probe set.

    Raises:
      InputError: a file is missing or was edited, the pairs belong to another probe set, or a pair does not record what
        replaying its streams gives.
    """
    names = ProbeSetLayout(probe.path)
    path, manifest_path = names.pairs, names.pairs_manifest
    try:
        manifest = PairManifest.model_validate(read_json(manifest_path))
    except pydantic.ValidationError as error:
        raise misfit(manifest_path, error, "the manifest of a pair set") from None
    if not path.is_file():
        raise unusable(path, "the pairs of the probe set", "no such file")
    if file_sha256(path) != manifest.pairs_sha256:
        raise unusable(path, f"the content hashed in {manifest_path.name}", "an edited file")
    if content_digest(manifest.model_dump()) != manifest.content_sha256:
        raise unusable(manifest_path, "the content its own hash names", "an edited file")
    if manifest.probe_set_sha256 != probe.manifest.content_sha256:
        expected = f"the pairs of {probe.path} (remove this file to have them made again)"
        raise unusable(manifest_path, expected, "another probe set's")
    pairs = []
    for number, document in enumerate(read_json_lines(path), start=1):
        try:
            pairs.append(StreamPair.model_validate(document))
        except pydantic.ValidationError as error:
            raise misfit(f"{path}:{number}", error, "a pair of streams") from None
        check_pair(pairs[-1], benchmark.vocabulary, f"{path}:{number}")
    return PairSet(path, manifest, tuple(pairs))


def check_pair(pair: StreamPair, vocabulary: Vocabulary, where: object) -> None:
    """Raises `InputError` unless a pair records what replaying its two streams gives."""
    recorded = pair.model_dump()
    try:
        replayed = _described(pair.clean_tokens, pair.corrupted_tokens, vocabulary)
    except (InputError, KeyError) as error:
        raise unusable(where, f"{pair.pair_id} to be two streams of the task", error) from None
    for field, value in replayed.items():
        if recorded[field] != value:
            expected = f"{field} of {pair.pair_id} as replaying its streams gives it, {one_line(value)}"
            raise unusable(where, expected, recorded[field])
    if not (0 <= pair.target_read < len(pair.reads) and pair.reads[pair.target_read].answer_changes):
        raise unusable(where, f"a target read of {pair.pair_id} whose answer changes", pair.target_read)


def _take_turns(sources: Sequence[Sequence[StreamPair]]) -> Iterator[StreamPair]:
    for round_ in itertools.zip_longest(*sources):
        yield from (pair for pair in round_ if pair is not None)


def _split_pairs(kind: str, split: str, probe: ProbeSet, benchmark: Benchmark, seed: int) -> list[StreamPair]:
    """Lists every pair of a kind that a split allows, in the order to take them.

    Pairs that break the fewest rules come first. Among equals comes one pair of every record, then a second of every
    record, and so on, with records in random order.
    """
    rng = random.Random(f"{seed}/pairs/{kind}/{split}")
    records = [record for record in probe.records if record["split"] == split]
    rng.shuffle(records)
    lags = frozenset(event["writes_since_support"] for record in records for event in record["query_events"])
    ordered = []
    for place, record in enumerate(records):
        found = sorted(_record_pairs(kind, record, probe, benchmark, lags, rng), key=lambda entry: entry[0])
        ordered += [((broken, nth, place), pair) for nth, (broken, pair) in enumerate(found)]
    return [pair for _, pair in sorted(ordered, key=lambda entry: entry[0])]


def _record_pairs(
    kind: str, record: Record, probe: ProbeSet, benchmark: Benchmark, lags: frozenset[int], rng: random.Random
) -> Iterator[tuple[int, StreamPair]]:
    """Yields a record's pairs of a kind in random order, each with how far it breaks rules."""
    if kind == "value" and record["counterfactual_of"]:
        yield 0, _counterfactual_pair(record, probe.sources[record["sample_id"]], benchmark.vocabulary)
        return
    program = program_of(record)
    order = list(range(len(program.reads)))
    rng.shuffle(order)
    seen: set[int | Program] = set()
    for index in order:
        # If a write changes, all its reads are affected: a second read of it would repeat the pair.
        site = index if kind == "query" else program.reads[index].support_write_index
        if site in seen:
            continue
        corruption = corrupt(
            kind,
            program,
            index,
            vocabulary=benchmark.vocabulary,
            heldout_pairs=benchmark.heldout,
            split=record["split"],
            lags=lags,
            rng=rng,
        )
        # Exchanging the supports of two reads gives the same pair twice.
        if corruption is not None and corruption.program not in seen:
            seen |= {site, corruption.program}
            tokens = _tokens(corruption.program, benchmark.vocabulary)
            pair = _pair(kind, record["split"], (record, tokens), None, index, benchmark.vocabulary)
            yield corruption.broken_rules, pair


def _counterfactual_pair(record: Record, source: Record, vocabulary: Vocabulary) -> StreamPair:
    """Takes the benchmark's own pair: the source is clean, the counterfactual corrupted."""
    where = f"{record['sample_id']} and its source {source['sample_id']}"
    try:
        found = difference(source["tokens"], record["tokens"])
    except InputError as error:
        raise unusable(where, "streams with one supporting write's value changed", error) from None
    if len(found.input_positions) != 1:
        changes = f"changes at positions {', '.join(map(str, found.input_positions))}"
        raise unusable(where, "streams with one supporting write's value changed", changes)
    target = next(index for index, read in enumerate(found.reads) if read.is_affected)
    return _pair("value", record["split"], (source, record["tokens"]), record["sample_id"], target, vocabulary)


def _tokens(program: Program, vocabulary: Vocabulary) -> list[str]:
    return build_record(program, vocabulary, sample_id="", split="", heldout_pairs=frozenset())["tokens"]


def _pair(
    kind: str,
    split: str,
    streams: tuple[Record, list[str]],
    corrupted_id: str | None,
    target_read: int,
    vocabulary: Vocabulary,
) -> StreamPair:
    clean, corrupted_tokens = streams
    return StreamPair(
        pair_id="",
        kind=kind,
        split=split,
        clean_id=clean["sample_id"],
        corrupted_id=corrupted_id,
        target_read=target_read,
        clean_tokens=clean["tokens"],
        corrupted_tokens=corrupted_tokens,
        **_described(clean["tokens"], corrupted_tokens, vocabulary),
    )


def _described(clean: Sequence[str], corrupted: Sequence[str], vocabulary: Vocabulary) -> dict:
    """Derives the fields of a pair that follow from its two streams."""
    found = difference(clean, corrupted)
    return {
        "clean_token_ids": [vocabulary.id_of[token] for token in clean],
        "corrupted_token_ids": [vocabulary.id_of[token] for token in corrupted],
        "reads": [
            {
                "query_index": index,
                "prediction_position": read.prediction_position,
                "clean_answer": read.clean_answer,
                "corrupted_answer": read.corrupted_answer,
                "answer_changes": read.is_affected,
            }
            for index, read in enumerate(found.reads)
        ],
        "changed_inputs": list(found.input_positions),
        "changed_answers": list(found.answer_positions),
        "position_roles": list(found.roles),
    }
