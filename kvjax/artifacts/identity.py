"""Decide whether a stored result is reused, made again, or stands in the way of other settings.

A result depends on the settings a person chose and on inputs. Other inputs make it stale: it is made again. Other
settings make it another result, which may have cost hours: it is replaced only if `overwrite` says so.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from kvjax.artifacts.files import digest
from kvjax.errors import unusable

Decision = Literal["reuse", "redo"]


@dataclasses.dataclass(frozen=True)
class Identity:
    """Everything that a stored result depends on.

    Attributes:
      settings: what a person chose, by the names of parameters.
      inputs: hashes of files, and the version of the measures.
    """

    settings: Mapping[str, Any]
    inputs: Mapping[str, Any]

    @property
    def document(self) -> dict[str, Any]:
        """The identity as a result records it."""
        return {"settings": dict(self.settings), "inputs": dict(self.inputs)}

    @property
    def sha256(self) -> str:
        """The hash of `document`."""
        return digest(self.document)

    def decide(self, recorded: Any, where: Path, *, overwrite: bool = False) -> Decision:
        """Decides whether a stored result is reused or made again.

        Args:
          recorded: the `document` of the stored result's identity; None if there is no readable result.
          where: the file that records it, for the error.
          overwrite: whether a result of other settings may be replaced.

        Raises:
          InputError: the result was made with other settings, or does not say with which, and `overwrite` is not set.
        """
        if recorded is None or overwrite:
            return "redo"
        settings = recorded.get("settings") if isinstance(recorded, dict) else None
        if not isinstance(settings, dict):
            found = "one that does not say what it was measured on"
            raise unusable(where, "a result of this version, or `overwrite`", found)
        if changed := [name for name, value in self.settings.items() if settings.get(name) != value]:
            before, now = (
                " ".join(_written(name, of.get(name)) for name in changed) for of in (settings, self.settings)
            )
            raise unusable(where, f"{before}, as it was measured, or `overwrite`", now)
        return "reuse" if recorded.get("inputs") == self.inputs else "redo"


def content_digest(document: Mapping[str, Any], field: str = "content_sha256") -> str:
    """Hashes a manifest without the field that holds this hash."""
    return digest({name: value for name, value in document.items() if name != field})


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the hash of its content to a document, by which `check_seal` finds out whether it was edited."""
    as_read = json.loads(json.dumps(dict(document)))  # keys that JSON makes texts are sorted as texts
    return {**document, "content_sha256": content_digest(as_read)}


def check_seal(document: Mapping[str, Any], where: Path, remedy: str) -> None:
    """Checks that a document is as it was sealed.

    Args:
      document: as JSON gives it.
      where: its file, for the error.
      remedy: what makes the file again, for the error.

    Raises:
      InputError: it was edited or damaged, or has no seal.
    """
    recorded = document.get("content_sha256")
    if not recorded:
        raise unusable(where, f"the hash of its own content ({remedy})", "none")
    if recorded != content_digest(document):
        raise unusable(where, f"the content that its own hash names ({remedy})", "an edited file")


def _written(name: str, value: Any) -> str:
    """Writes a setting as an argument; a long hash by its first digits."""
    if value is None:
        return f"no `{name}`"
    if isinstance(value, Mapping):
        value = [f"{key}:{part}" for key, part in value.items()]
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"`{name}={text[:12] if len(text) == 64 else text}`"
