"""Check, write and read `factor.json`: what a factor of a screen changes, and what it does not (docs/formats.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pydantic

from kvjax.artifacts.comparison_schema import EventEntry, Leader, RoleWinner, SpreadEntry, StabilityEntry
from kvjax.artifacts.files import FileHash, Replace, read_json, replace_file, write_json
from kvjax.artifacts.identity import check_seal, sealed
from kvjax.errors import misfit


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ScreenedRun(_Part):
    """A run of a setting; `diverged_at` is the step at which its loss stopped being finite, null if it did not.

    A run without a single measured checkpoint has no hashes.
    """

    name: str
    path: str
    seed: int
    state: Literal["finished", "diverged"]
    diverged_at: int | None
    last_step: int | None
    sweep_sha256: str | None
    probe_set_sha256: str | None
    story_sha256: str | None = None


class RunCandidates(_Part):
    """The leading components of a run at its best checkpoint: candidates for what carries the lookup."""

    run: str
    step: int
    ranked_by: str
    heads: list[Leader]
    mlps: list[Leader]


class SettingEntry(_Part):
    """One value of the factor over its seeds.

    `accuracy` holds split -> `best` and `last` measured checkpoint; `full_splits` the best checkpoint on whole splits;
    `on_base_probe_set` the same as `accuracy` on the base's probe set, for a setting with other data. `seeds` is the
    folder of the comparison of its seeds, null if fewer than two were measured.
    """

    label: str
    overrides: dict[str, Any]
    runs: list[ScreenedRun]
    births: dict[str, EventEntry]
    half_rises: dict[str, EventEntry]
    accuracy: dict[str, dict[str, SpreadEntry]]
    full_splits: dict[str, SpreadEntry]
    on_base_probe_set: dict[str, dict[str, SpreadEntry]]
    residual: dict[str, SpreadEntry]
    candidates: list[RunCandidates]
    roles: dict[str, list[RoleWinner]]
    role_stability: StabilityEntry | None
    address_stability: StabilityEntry | None
    seeds: str | None


class SharesEntry(_Part):
    """How the variance of a summary splits between settings and the seeds within them.

    `share` is that of settings, with 95 % limits; null where nothing varies or too few runs have a value.
    """

    method: str
    between: float | None
    within: float | None
    share: float | None
    low: float | None
    high: float | None


class SummaryEntry(_Part):
    """One number per run, by label and run name: each setting's median, and less the base's, and variance shares."""

    unit: str
    values: dict[str, dict[str, float | None]]
    medians: dict[str, float | None] = {}  # older versions did not record them
    shares: SharesEntry | None
    difference: dict[str, float | None]


class FactorComparison(_Part):
    """`factor.json`; `arrays` and `files` as in `Comparison`, `content_sha256` is the hash of all else."""

    schema_version: int
    screen: str
    factor: str
    base_label: str
    settings: list[SettingEntry]
    summaries: dict[str, SummaryEntry]
    notes: list[str]
    findings: list[str]
    versions: dict[str, str]
    arrays: FileHash
    files: dict[str, FileHash] = {}
    content_sha256: str = ""


def write_factor(path: Path, document: dict[str, Any], *, replace: Replace = replace_file) -> None:
    """Checks the document against its schema and writes it atomically."""
    checked = FactorComparison.model_validate(document)
    write_json(path, sealed(checked.model_dump(mode="json", exclude={"content_sha256"})), replace=replace)


def read_factor(path: Path) -> FactorComparison:
    """Reads the comparison of a factor's settings.

    Raises:
      InputError: the file is missing, does not fit the schema, or was edited.
    """
    document = read_json(path)
    try:
        found = FactorComparison.model_validate(document)
    except pydantic.ValidationError as error:
        raise misfit(path, error, "a comparison of a factor (run kvjax factor-screen)") from None
    check_seal(document, path, "run kvjax factor-screen again")
    return found
