"""Identities: when a stored result is reused, made again, or refused."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest

from kvjax.artifacts.files import FileHash, digest
from kvjax.artifacts.identity import Identity, content_digest
from kvjax.errors import InputError

WANTED = Identity({"precision": "highest", "components": None}, {"checkpoints": {"100": "ab"}, "version": 1})
RECORDED = {
    "settings": {"precision": "highest", "components": None},
    "inputs": {"version": 1, "checkpoints": {"100": "ab"}},
}


@pytest.mark.parametrize(
    ("recorded", "overwrite", "decision"),
    [
        (RECORDED, False, "reuse"),
        (RECORDED | {"inputs": {"version": 0}}, False, "redo"),
        (RECORDED | {"inputs": None}, False, "redo"),
        (None, False, "redo"),
        (RECORDED, True, "redo"),
        ({}, True, "redo"),
        (RECORDED | {"settings": {"precision": "default"}}, True, "redo"),
    ],
)
def test_decision(recorded, overwrite, decision):
    """Equal settings and inputs are reused; stale, missing and overwritten results are made again."""
    assert WANTED.decide(recorded, Path("a.json"), overwrite=overwrite) == decision


@pytest.mark.parametrize(
    ("recorded", "complaint"),
    [
        (
            RECORDED | {"settings": {"precision": "default", "components": ["L0H1", "MLP2"]}},
            "a.json: expected `precision=default` `components=L0H1,MLP2`, as it was measured, or `overwrite`; "
            "found `precision=highest` no `components`",
        ),
        (
            {"settings": {"precision": "default"}, "inputs": {"version": 0}},
            "a.json: expected `precision=default`, as it was measured, or `overwrite`; found `precision=highest`",
        ),
        ({}, "a.json: expected a result of this version, or `overwrite`; found one that does not say"),
        ([], "a.json: expected a result of this version"),
        ({"settings": "highest"}, "a.json: expected a result of this version"),
    ],
)
def test_refusal(recorded, complaint):
    """Other settings, or none that can be read, are refused with both values and the remedy."""
    with pytest.raises(InputError) as refused:
        WANTED.decide(recorded, Path("a.json"))
    assert str(refused.value).startswith(complaint)


def test_digest_by_hand():
    """A digest is the SHA-256 of the document's JSON with sorted keys, whatever the order it was made in."""
    by_hand = hashlib.sha256(b'{"a": [1, null], "b": "x"}').hexdigest()
    assert digest({"b": "x", "a": [1, None]}) == digest({"a": (1, None), "b": "x"}) == by_hand
    assert content_digest({"b": "x", "content_sha256": "?", "a": [1, None]}) == by_hand
    assert Identity({"a": 1}, {}).sha256 == hashlib.sha256(b'{"inputs": {}, "settings": {"a": 1}}').hexdigest()


def test_identity_depends_on_every_part():
    """Another setting and another input each make another hash."""
    others = [dataclasses.replace(WANTED, settings={}), dataclasses.replace(WANTED, inputs={})]
    assert len({WANTED.sha256, *(other.sha256 for other in others)}) == 3


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"abcd", None), (b"abcx", "found SHA-256"), (b"abc", "found 3 bytes"), (b"", "found 0 bytes"), (None, "no such")],
)
def test_file_hash(tmp_path, content, complaint):
    """A flipped byte, a truncated, empty or missing file is one line with the remedy."""
    path = tmp_path / "table"
    path.write_bytes(b"abcd")
    recorded = FileHash.of(path)
    assert recorded == FileHash(hashlib.sha256(b"abcd").hexdigest(), 4)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    if complaint is None:
        recorded.check(path, recorded_in=Path("sweep.json"), remedy="sweep again")
        return
    with pytest.raises(
        InputError, match=r"table: expected the 4 bytes, SHA-256 \w{12}, .*sweep.json.*\(sweep again\)"
    ) as e:
        recorded.check(path, recorded_in=Path("sweep.json"), remedy="sweep again")
    assert complaint in str(e.value) and "\n" not in str(e.value)
