"""Checks benchmark records whole: all of a record follows from its tokens, and is compared with what they say."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

from kvjax.errors import InputError, one_line, unusable
from kvjax.task.stream import Program, Read, Record, build_record, replay
from kvjax.task.vocabulary import WRITE, Vocabulary

# Fields that a record of another program may lack: nothing reads them.
_SIGNATURE = "latent_program_signature"  # which other programs form in another way
_OPTIONAL = ("changed_write_index", "counterfactual_of", _SIGNATURE, "steps")


def check_record(
    document: Any,
    vocabulary: Vocabulary,
    heldout: frozenset[tuple[str, str]],
    where: object,
    *,
    split: str | None = None,
) -> Record:
    """Checks a record against what replaying its tokens gives.

    Args:
      document: the record, as it was read.
      vocabulary: the benchmark's.
      heldout: the benchmark's held-out (key, value) pairs.
      where: the file and line, for the error.
      split: the split it must be of; None if any will do.

    Returns:
      The record, with every field of docs/formats.md.

    Raises:
      InputError: a field is missing, of another kind, or contradicts the tokens.
    """
    if not isinstance(document, dict):
        raise unusable(where, "a benchmark record", type(document).__name__)
    for name in ("sample_id", "split"):
        if not isinstance(document.get(name), str):
            raise unusable(where, f"a benchmark record with a text {name}", _shown(document, name))
    if split is not None and document["split"] != split:
        raise unusable(where, f"a record of split {split}", document["split"])
    program = _program(document.get("tokens"), vocabulary, where)
    source, changed = document.get("counterfactual_of"), document.get("changed_write_index")
    if source is not None and not isinstance(source, str):
        raise unusable(where, "counterfactual_of to be the sample_id of a record, or null", source)
    if changed is not None and (type(changed) is not int or not 0 <= changed < len(program.writes)):
        raise unusable(where, f"changed_write_index to be null or below {len(program.writes)}", changed)
    record = build_record(
        program,
        vocabulary,
        sample_id=document["sample_id"],
        split=document["split"],
        heldout_pairs=heldout,
        counterfactual_of=source,
        changed_write_index=changed,
    )
    if isinstance(document.get(_SIGNATURE), str):
        record[_SIGNATURE] = document[_SIGNATURE]
    for name, value in record.items():
        if name not in document:
            if name in _OPTIONAL:
                continue
            raise unusable(where, f"a benchmark record with {name}", "none")
        if document[name] != value and (difference := _difference(value, document[name], name)):
            raise unusable(where, difference[0], difference[1])
    if others := {name: value for name, value in document.items() if name not in record}:
        try:
            json.dumps(others, allow_nan=False)
        except ValueError:
            raise unusable(where, "finite numbers", one_line(others)) from None
    return document | record


def check_counterfactual(record: Record, source: Record, where: object) -> None:
    """Checks that a counterfactual is its source with the value of one write changed, as its fields say.

    Raises:
      InputError: they differ in anything else; `where` is the place of the counterfactual.
    """
    of = f"{record['sample_id']} to be {source['sample_id']}"
    written, before = ([(write["key"], write["value"]) for write in one["writes"]] for one in (record, source))
    changed = [index for index, pair in enumerate(zip(written, before, strict=False)) if pair[0] != pair[1]]
    same_keys = [key for key, _ in written] == [key for key, _ in before]
    if len(changed) != 1 or not same_keys or record["query_plan"] != source["query_plan"]:
        found = f"{len(changed)} changed writes" if same_keys else "other keys"
        raise unusable(where, f"{of} with the value of one write changed, and the same reads", found)
    if record["changed_write_index"] not in (None, *changed):
        raise unusable(where, f"{of} with write {record['changed_write_index']} changed", f"write {changed[0]}")


def _program(tokens: Any, vocabulary: Vocabulary, where: object) -> Program:
    """Reads the program that tokens spell."""
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise unusable(where, "a benchmark record with tokens, a list of texts", tokens)
    unknown = [token for token in tokens if token not in vocabulary.id_of]
    if unknown:
        raise unusable(where, "tokens of the benchmark's vocabulary", unknown[0])
    try:
        replayed = replay(tokens)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if not replayed:
        raise unusable(where, "a stream with at least one read", "none")
    keys, values = frozenset(vocabulary.key_tokens), frozenset(vocabulary.value_tokens)
    writes: list[tuple[str, str]] = []
    reads: list[Read] = []
    latest: dict[str, int] = {}
    for at in range(1, len(tokens) - 1, 3):
        op, key, value = tokens[at : at + 3]
        if key not in keys or value not in values:
            raise unusable(where, f"a key and a value after position {at}", f"{key} {value}")
        if op == WRITE:
            latest[key] = len(writes)
            writes.append((key, value))
        else:
            reads.append(Read(len(writes) - 1, key, latest[key]))
    return Program(tuple(writes), tuple(reads))


def _difference(expected: Any, found: Any, name: str) -> tuple[str, Any] | None:
    """Finds the first place where a field lacks what the tokens say: what to expect there, and what was found."""
    if isinstance(expected, dict) and isinstance(found, dict):
        parts: Sequence[tuple[str, Any, Any]] = [
            (f"{name}.{key}", value, found.get(key, "none")) for key, value in expected.items()
        ]
    elif isinstance(expected, list) and isinstance(found, list):
        pairs = itertools.zip_longest(expected, found, fillvalue="none")
        parts = [(f"{name}[{index}]", *pair) for index, pair in enumerate(pairs)]
    else:
        return None if expected == found else (f"{name} to be {one_line(expected)}, as the tokens give it", found)
    return next((place for part, a, b in parts if (place := _difference(a, b, part))), None)


def _shown(document: dict[str, Any], name: str) -> Any:
    return type(document[name]).__name__ if name in document else "none"
