"""Corrupts streams for interventions: four ways to change a stream so that the answer of a read changes.

Each kind changes the input of one part of the lookup, because a component shows only under a corruption of its input
(docs/definitions.md, "Pairs of streams"). A corrupted stream is a stream of the task: only keys and values of writes
and keys of reads change, and every read's answer is looked up anew.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence

from kvjax.config.benchmark import HELDOUT_SPLIT
from kvjax.errors import InputError
from kvjax.task.stream import Program, Read, replay
from kvjax.task.vocabulary import Vocabulary

PAIR_KINDS = ("value", "query", "swap", "stale")

# Roles of the positions of a pair, seen from the reads whose answer changes. They are disjoint.
PAIR_ROLES = ("before", "changed", "earlier_answers", "between", "operator", "prediction")


@dataclasses.dataclass(frozen=True)
class Corruption:
    """A corrupted program, and how far it breaks rules of the benchmark.

    A model may fail on streams unlike its training streams for other reasons than the change. `broken_rules` counts:

    - consecutive writes to one key;
    - reads of a key that was never overwritten;
    - for each read, the distance of its lag (writes since its support) from the nearest lag of reads in the split.

    Some corruptions cannot keep every rule: an overwritten value lies further back.
    """

    program: Program
    broken_rules: int


def corrupt(
    kind: str,
    program: Program,
    read_index: int,
    *,
    vocabulary: Vocabulary,
    heldout_pairs: frozenset[tuple[str, str]],
    split: str,
    lags: frozenset[int],
    rng: random.Random,
) -> Corruption | None:
    """Changes a program, at the same length, so that a read's answer differs; gives None if the kind allows no change.

    - `value`: the support write gets a value that the stream does not hold.
    - `query`: the read asks for another key written before it.
    - `swap`: the support write and another write exchange keys, so that the other write's value becomes the answer.
    - `stale`: the support write goes to another key of the stream, so that the value it overwrote becomes the answer.

    The result is drawn from the changes that break the fewest rules. Outside the `heldout_pairs` split no changed write
    makes a held-out pair. Inside it `value` keeps to held-out pairs; `swap` and `stale` may make seen ones.

    Args:
      kind: one of `PAIR_KINDS`.
      program: the clean stream's.
      read_index: which of its reads must change its answer.
      vocabulary: the tokens to draw from.
      heldout_pairs: (key, value) pairs that belong to the `heldout_pairs` split alone.
      split: the record's split.
      lags: the lags that reads of the split have.
      rng: the generator to draw with.
    """

    def keeps_splits_apart(candidate: Program) -> bool:
        changed = [pair for pair, before in zip(candidate.writes, program.writes, strict=True) if pair != before]
        if split != HELDOUT_SPLIT:
            return not heldout_pairs.intersection(changed)
        return kind != "value" or heldout_pairs.issuperset(changed)

    candidates = [
        (c, wanted) for c, wanted in _CANDIDATES[kind](program, read_index, vocabulary) if keeps_splits_apart(c)
    ]
    if kind == "value" and candidates:
        candidates = [rng.choice(candidates)]  # they differ in the value alone, and break the same rules
    old = program.writes[program.reads[read_index].support_write_index][1]
    best: list[Corruption] = []
    for candidate, wanted in candidates:
        altered = _looked_up(candidate)
        if altered is None:
            continue
        answer = altered.writes[altered.reads[read_index].support_write_index][1]
        if answer == old or wanted not in (None, answer):
            continue
        found = Corruption(altered, _broken_rules(altered, lags))
        if not best or found.broken_rules < best[0].broken_rules:
            best = []
        if not best or found.broken_rules == best[0].broken_rules:
            best.append(found)
    return rng.choice(best) if best else None


# A candidate is a program whose reads still have the clean supports, and the answer that its kind asks for.
_Candidates = Iterator[tuple[Program, str | None]]


def _with_writes(program: Program, changes: dict[int, tuple[str, str]]) -> Program:
    writes = tuple(changes.get(index, write) for index, write in enumerate(program.writes))
    return dataclasses.replace(program, writes=writes)


def _value_candidates(program: Program, read_index: int, vocabulary: Vocabulary) -> _Candidates:
    support = program.reads[read_index].support_write_index
    key = program.writes[support][0]
    used = {value for _, value in program.writes}
    for value in vocabulary.value_tokens:
        if value not in used:
            yield _with_writes(program, {support: (key, value)}), value


def _query_candidates(program: Program, read_index: int, vocabulary: Vocabulary) -> _Candidates:
    read = program.reads[read_index]
    active = {key for key, _ in program.writes[: read.slot_after_write + 1]} - {read.key}
    for key in sorted(active):
        reads = list(program.reads)
        reads[read_index] = dataclasses.replace(read, key=key)
        yield dataclasses.replace(program, reads=tuple(reads)), None


def _swap_candidates(program: Program, read_index: int, vocabulary: Vocabulary) -> _Candidates:
    read = program.reads[read_index]
    support = read.support_write_index
    key, value = program.writes[support]
    for other, (other_key, other_value) in enumerate(program.writes[: read.slot_after_write + 1]):
        if other_key != key:
            yield _with_writes(program, {support: (other_key, value), other: (key, other_value)}), other_value


def _stale_candidates(program: Program, read_index: int, vocabulary: Vocabulary) -> _Candidates:
    support = program.reads[read_index].support_write_index
    key, value = program.writes[support]
    earlier = [written for written_key, written in program.writes[:support] if written_key == key]
    if earlier:
        for other in sorted({other for other, _ in program.writes} - {key}):
            yield _with_writes(program, {support: (other, value)}), earlier[-1]


_CANDIDATES = {
    "value": _value_candidates,
    "query": _query_candidates,
    "swap": _swap_candidates,
    "stale": _stale_candidates,
}


def _looked_up(program: Program) -> Program | None:
    """Finds every read's support anew; gives None if a read precedes all writes of its key."""
    reads = []
    for read in program.reads:
        latest = next((i for i in range(read.slot_after_write, -1, -1) if program.writes[i][0] == read.key), None)
        if latest is None:
            return None
        reads.append(Read(read.slot_after_write, read.key, latest))
    return dataclasses.replace(program, reads=tuple(reads))


def _broken_rules(program: Program, lags: frozenset[int]) -> int:
    keys = [key for key, _ in program.writes]
    repeats = sum(first == second for first, second in itertools.pairwise(keys))
    first_writes = sum(read.key not in keys[: read.support_write_index] for read in program.reads)
    return (
        repeats
        + first_writes
        + sum(min(abs(read.writes_since_support - usual) for usual in lags) for read in program.reads)
    )


@dataclasses.dataclass(frozen=True)
class ReadChange:
    """One read in both streams of a pair.

    Attributes:
      prediction_position: p_e, the same in both.
      clean_answer, corrupted_answer: its answer token in each.
    """

    prediction_position: int
    clean_answer: str
    corrupted_answer: str

    @property
    def is_affected(self) -> bool:
        return self.clean_answer != self.corrupted_answer


@dataclasses.dataclass(frozen=True)
class Difference:
    """How two streams of one length differ, up to the prediction of the last read whose answer changes.

    Attributes:
      reads: every read.
      input_positions: the positions the corruption changed: keys and values of writes, a read's key.
      answer_positions: the positions of answers that changed with them.
      roles: of every position, one of `PAIR_ROLES`; None after the last affected prediction position.
    """

    reads: tuple[ReadChange, ...]
    input_positions: tuple[int, ...]
    answer_positions: tuple[int, ...]
    roles: tuple[str | None, ...]


def difference(clean: Sequence[str], corrupted: Sequence[str]) -> Difference:
    """Compares two streams by their tokens alone.

    A position has the first of these roles that fits:

    - None: after p_e of the last affected read, that is, of the last read whose answer changes.
    - `before`: ahead of the first changed token; both runs agree there, which makes it a zero control.
    - `prediction`, `operator`: p_e of an affected read, and the operator token ahead of it.
    - `earlier_answers`: an answer that changed; later reads of the same write can copy it.
    - `changed`: another token that changed.
    - `between`: the rest.

    If a read's own key is changed (`query`), that token is p_e: it has the role `prediction`, no position has the role
    `changed`, and the operator lies `before`.

    Raises:
      InputError: one of them is not a stream of the task, their events do not line up, or no answer changes.
    """
    if len(clean) != len(corrupted) or list(clean[1:-1:3]) != list(corrupted[1:-1:3]):
        operators = [" ".join(tokens[1:-1:3]) for tokens in (clean, corrupted)]
        raise InputError(f"expected two streams of the same operators; found {operators[0]} and {operators[1]}")
    reads = tuple(
        ReadChange(before.answer_position - 1, before.answer, after.answer)
        for before, after in zip(replay(clean), replay(corrupted), strict=True)
    )
    predictions = {read.prediction_position for read in reads if read.is_affected}
    if not predictions:
        raise InputError("expected a read whose answer changes; found none")
    last = max(predictions)
    differing = [position for position in range(last + 1) if clean[position] != corrupted[position]]
    answers = {read.prediction_position + 1 for read in reads}

    def role(position: int) -> str | None:
        if position > last:
            return None
        if position < differing[0]:
            return "before"
        if position in predictions:
            return "prediction"
        if position + 1 in predictions:
            return "operator"
        if position in differing:
            return "earlier_answers" if position in answers else "changed"
        return "between"

    return Difference(
        reads=reads,
        input_positions=tuple(position for position in differing if position not in answers),
        answer_positions=tuple(position for position in differing if position in answers),
        roles=tuple(role(position) for position in range(len(clean))),
    )
