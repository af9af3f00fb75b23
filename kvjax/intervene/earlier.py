"""Interventions measured before: found again where they were measured on exactly what is asked for now."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from kvjax.artifacts.files import read_json
from kvjax.artifacts.layout import arrays_beside
from kvjax.artifacts.tables import read_dataset
from kvjax.errors import InputError, unusable

# Raised whenever a number of an intervention or a name in its files changes, so that older ones are measured anew.
INTERVENTION_VERSION = 2

HASH_ATTRIBUTE = "measured_on_sha256"  # of the arrays, so that they are not taken for another summary's


@dataclasses.dataclass(frozen=True)
class MeasuredOn:
    """What the numbers of one kind of intervention in one window depend on.

    Attributes:
      settings: what whoever asked for it chose, by the names of the flags.
      inputs: hashes of checkpoints, pairs and probe set, the window, and the version of the measures.
    """

    settings: dict[str, Any]
    inputs: dict[str, Any]

    def to_document(self) -> dict[str, Any]:
        """Returns it as a summary holds it."""
        return {"settings": self.settings, "inputs": self.inputs}

    def sha256(self) -> str:
        """Returns a hash of all of it."""
        return hashlib.sha256(json.dumps(self.to_document(), sort_keys=True).encode()).hexdigest()


def find_earlier(path: Path, wanted: MeasuredOn) -> dict[str, Any] | None:
    """Returns the summary at `path` where it and the arrays beside it are of `wanted`; None where they have to be made.

    Raises:
      InputError: it was measured with other settings, or does not say with which, and would be lost.
    """
    if not path.is_file():
        return None
    try:
        document = read_json(path)
    except InputError:
        return None  # damaged
    if not isinstance(document, dict):
        return None
    try:
        settings, inputs = dict(document["measured_on"]["settings"]), document["measured_on"]["inputs"]
    except (KeyError, TypeError, ValueError):
        found = "one that does not say what it was measured on"
        raise unusable(path, "a summary of this version, or `overwrite`", found) from None
    if changed := [name for name in wanted.settings if settings.get(name) != wanted.settings[name]]:
        before, now = (" ".join(_as_flag(name, of.get(name)) for name in changed) for of in (settings, wanted.settings))
        raise unusable(path, f"{before}, as it was measured, or `overwrite`", now)
    if inputs != wanted.inputs:
        return None
    try:
        arrays = read_dataset(arrays_beside(path), expected="every number of a summary")
    except InputError:
        return None
    return document if arrays.attrs.get(HASH_ATTRIBUTE) == wanted.sha256() else None


def _as_flag(name: str, value: Any) -> str:
    if value is None:
        return f"no `{name}`"
    return f"`{name}={','.join(value) if isinstance(value, list) else value}`"
