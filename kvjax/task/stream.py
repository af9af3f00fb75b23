"""Builds a key-value stream's record from its program of writes and reads, and replays a record's tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax.errors import InputError
from kvjax.task.vocabulary import BOS, EOS, READ, WRITE, Vocabulary

Record = dict[str, Any]

EVENT_AXES = ("writes_since_support", "tokens_since_support", "slot_after_write")
SEQUENCE_AXES = (
    "active_keys",
    "overwrite_count",
    "num_queries",
    "total_writes",
    "mean_query_lag",
    "max_query_lag",
    "context_tokens",
)


@dataclasses.dataclass(frozen=True)
class Read:
    """A read of `key`, placed after write number `slot_after_write`, that returns write `support_write_index`."""

    slot_after_write: int
    key: str
    support_write_index: int

    @property
    def writes_since_support(self) -> int:
        return self.slot_after_write - self.support_write_index


@dataclasses.dataclass(frozen=True)
class Program:
    """The events of a stream: writes in order, and reads sorted by the write they follow.

    Attributes:
      writes: (key, value) of each write.
      reads: sorted by `slot_after_write`.
    """

    writes: tuple[tuple[str, str], ...]
    reads: tuple[Read, ...]

    def signature(self) -> str:
        """Computes the SHA-256 that identifies this program; records with equal signatures are repeats."""
        document = {
            "writes": self.writes,
            "reads": [[read.slot_after_write, read.key, read.support_write_index] for read in self.reads],
        }
        return hashlib.sha256(json.dumps(document, separators=(",", ":")).encode()).hexdigest()


def build_record(
    program: Program,
    vocabulary: Vocabulary,
    *,
    sample_id: str,
    split: str,
    heldout_pairs: frozenset[tuple[str, str]],
    counterfactual_of: str | None = None,
    changed_write_index: int | None = None,
) -> Record:
    """Builds the record of a program (docs/formats.md, "A record")."""
    tokens = [BOS]
    steps: list[Record] = []
    events: list[Record] = []
    write_positions: list[dict[str, int]] = []
    reads_at: dict[int, list[Read]] = {}
    for read in program.reads:
        reads_at.setdefault(read.slot_after_write, []).append(read)

    for write_index, (key, value) in enumerate(program.writes):
        at = len(tokens)
        positions = {"op": at, "key": at + 1, "value": at + 2}
        write_positions.append(positions)
        steps.append(
            {
                "step_index": len(steps),
                "op": "write",
                "key": key,
                "value": value,
                "positions": positions,
                "write_index": write_index,
            }
        )
        tokens += [WRITE, key, value]
        for read in reads_at.get(write_index, ()):
            at = len(tokens)
            answer = program.writes[read.support_write_index][1]
            positions = {"op": at, "key": at + 1, "answer": at + 2}
            support = write_positions[read.support_write_index]
            events.append(
                {
                    "query_index": len(events),
                    "step_index": len(steps),
                    "key": read.key,
                    "answer_value": answer,
                    "support_write_index": read.support_write_index,
                    "slot_after_write": write_index,
                    "writes_since_support": read.writes_since_support,
                    "tokens_since_support": positions["answer"] - support["value"],
                    "answer_pair_type": "heldout" if (read.key, answer) in heldout_pairs else "seen",
                    "positions": positions,
                    "support_positions": support,
                }
            )
            steps.append(
                {
                    "step_index": len(steps),
                    "op": "read",
                    "key": read.key,
                    "value": answer,
                    "positions": positions,
                    "query_index": len(events) - 1,
                    "support_write_index": read.support_write_index,
                }
            )
            tokens += [READ, read.key, answer]
    tokens.append(EOS)

    lags = [read.writes_since_support for read in program.reads]
    active_keys = len({key for key, _ in program.writes})
    return {
        "sample_id": sample_id,
        "split": split,
        "tokens": tokens,
        "token_ids": [vocabulary.id_of[token] for token in tokens],
        "axes": {
            "active_keys": active_keys,
            "overwrite_count": len(program.writes) - active_keys,
            "num_queries": len(lags),
            "total_writes": len(program.writes),
            "mean_query_lag": sum(lags) // len(lags),
            "max_query_lag": max(lags),
            "context_tokens": len(tokens),
        },
        "counterfactual_of": counterfactual_of,
        "changed_write_index": changed_write_index,
        "latent_program_signature": program.signature(),
        "exact_sequence_signature": " ".join(tokens),
        "writes": [
            {"write_index": index, "key": key, "value": value} for index, (key, value) in enumerate(program.writes)
        ],
        "query_plan": [
            {
                "slot_after_write": read.slot_after_write,
                "key": read.key,
                "support_write_index": read.support_write_index,
                "writes_since_support": read.writes_since_support,
            }
            for read in program.reads
        ],
        "steps": steps,
        "query_events": events,
    }


def program_of(record: Mapping[str, Any]) -> Program:
    """Reads the program that a record was built from."""
    return Program(
        writes=tuple((write["key"], write["value"]) for write in record["writes"]),
        reads=tuple(
            Read(read["slot_after_write"], read["key"], read["support_write_index"]) for read in record["query_plan"]
        ),
    )


@dataclasses.dataclass(frozen=True)
class ReplayedRead:
    """One read, found by replaying the tokens; positions count from 0 at `<bos>`.

    Attributes:
      key: the key read.
      answer: its third token.
      answer_position: that token's position.
      support_value_position: the value's position in the latest earlier write to the key.
      stale_value_position: the value position of the write to that key before the support; None if there is none.
      earlier_answer_positions: answers of earlier reads that returned the same write.
      stale_answer_positions: answers of earlier reads that returned the stale write.
    """

    key: str
    answer: str
    answer_position: int
    support_value_position: int
    stale_value_position: int | None
    earlier_answer_positions: tuple[int, ...]
    stale_answer_positions: tuple[int, ...]


def replay(tokens: Sequence[str]) -> list[ReplayedRead]:
    """Replays a stream against a dictionary, which is the task's definition, from the tokens alone.

    Raises:
      InputError: the tokens are not a stream, a read precedes every write of its key, or a read's third token is not
        the latest value of its key.
    """
    if len(tokens) < 2 or tokens[0] != BOS or tokens[-1] != EOS or len(tokens) % 3 != 2:
        raise InputError(f"expected <bos>, events of three tokens, <eos>; found {len(tokens)} tokens")
    history: dict[str, list[int]] = {}  # key -> value positions of its writes
    answers: dict[int, list[int]] = {}  # value position of a write -> answer positions that returned it
    reads = []
    for at in range(1, len(tokens) - 1, 3):
        op, key, value = tokens[at : at + 3]
        if op == WRITE:
            history.setdefault(key, []).append(at + 2)
        elif op == READ:
            if key not in history:
                raise InputError(f"expected a write of {key} before its read at position {at}; found none")
            support = history[key][-1]
            if tokens[support] != value:
                raise InputError(f"expected the read at position {at} to return {tokens[support]}; found {value}")
            stale = history[key][-2] if len(history[key]) > 1 else None
            reads.append(
                ReplayedRead(
                    key=key,
                    answer=value,
                    answer_position=at + 2,
                    support_value_position=support,
                    stale_value_position=stale,
                    earlier_answer_positions=tuple(answers.get(support, ())),
                    stale_answer_positions=tuple(answers.get(stale, ())) if stale is not None else (),
                )
            )
            answers.setdefault(support, []).append(at + 2)
        else:
            raise InputError(f"expected W or R at position {at}; found {op}")
    return reads
