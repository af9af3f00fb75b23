"""The digest of the code, by which processes that work together know that they run the same."""

from __future__ import annotations

from kvjax.artifacts.code_hash import CODE_SHA256, RUNNING, _digest_of_code


def test_digest_of_the_code(tmp_path):
    """The digest of the code covers every file's name and content."""
    (tmp_path / "model").mkdir()
    digests = set()
    for name, text in (("a.py", "x = 1"), ("a.py", "x = 2"), ("model/b.py", "x = 2")):
        (tmp_path / name).write_text(text)
        digests.add(_digest_of_code(tmp_path))
    assert len(digests) == 3


def test_words_for_the_code():
    """What processes compare has the version, for people, and the code."""
    assert RUNNING.startswith("0.") and CODE_SHA256[:8] in RUNNING
