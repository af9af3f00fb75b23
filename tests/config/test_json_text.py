"""JSON of other programs: sound text opens; what Python's parser would take in silence is refused in one line."""

import gc
import json

import pytest

from kvjax.config.json_text import parse_json, parse_json_lines
from kvjax.errors import InputError


def test_byte_order_mark():
    """A byte-order mark and Windows line ends change nothing."""
    assert parse_json(b'\xef\xbb\xbf{"a": 1}\r\n', "x.json", "a JSON file") == {"a": 1}
    assert parse_json_lines(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n\r\n', "x.jsonl") == [{"a": 1}, {"a": 2}]
    assert parse_json_lines(b"\n", "x.jsonl") == []


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('{"a": 1}'.encode("utf-16"), "in UTF-8; found UTF-16"),
        (b'{"a": "\xff"}', "in UTF-8; found 'utf-8' codec can't decode byte 0xff"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', 'found the field "c" twice in one object'),
        (b'{"a": "\\ud800"}', r"found half of a surrogate pair, such as \ud800"),
        (b"[" * 100_000, "found too many values inside one another"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b"", "found Expecting value"),
    ],
)
def test_text_that_is_no_sound_json(content, found):
    """Each is refused in one line that names the file."""
    with pytest.raises(InputError) as refusal:
        parse_json(content, "x.json", "a JSON file")
    line = str(refusal.value)
    assert line.startswith("x.json: expected a JSON file") and found in line and len(line) < 400 and "\n" not in line


def test_characters_outside_the_first_plane():
    """A whole surrogate pair is a character."""
    assert parse_json(b'{"a": "\\ud83d\\ude00"}', "x.json", "a JSON file") == {"a": "\U0001f600"}


def test_line_of_an_error():
    """An error in a line names the line, and garbage collection goes on after it."""
    with pytest.raises(InputError, match=r"x\.jsonl:2: expected a JSON object; found Expecting"):
        parse_json_lines(json.dumps({"a": 1}).encode() + b"\n{\n", "x.jsonl")
    assert gc.isenabled()
