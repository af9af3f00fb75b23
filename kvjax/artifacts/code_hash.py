"""Tells one state of kvjax's code from another: a version number stays the same while people edit."""

from __future__ import annotations

import hashlib
from pathlib import Path

import kvjax
from kvjax.artifacts.files import file_sha256


def _digest_of_code(package: Path) -> str:
    contents = [(str(path.relative_to(package)), file_sha256(path)) for path in sorted(package.rglob("*.py"))]
    return hashlib.sha256(repr(contents).encode()).hexdigest()


# The digest of the imported code is taken at import, because files may be edited while a long run goes on.
CODE_SHA256 = _digest_of_code(Path(kvjax.__file__).parent)

RUNNING = f"{kvjax.__version__} (code {CODE_SHA256[:8]})"  # what processes that work together must have in common
