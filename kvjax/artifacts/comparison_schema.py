"""Check, write and read `comparison.json`: what repeats across seeds (docs/formats.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pydantic

from kvjax.artifacts.files import FileHash, Replace, read_json, replace_file, write_json
from kvjax.artifacts.identity import check_seal, sealed
from kvjax.errors import misfit


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ComparedRun(_Part):
    """One run of a comparison; `best_step` is its best measured checkpoint on `validation_iid`.

    `story_sha256` is the hash of its story's content, and so of the windows and interventions that it rests on;
    older versions did not record it.
    """

    name: str
    path: str
    seed: int | None
    steps: list[int]
    planned_steps: int
    complete: bool
    best_step: int
    sweep_sha256: str
    probe_set_sha256: str
    story_sha256: str = ""


class AlignmentEntry(_Part):
    """How the runs were brought to common steps."""

    how: Literal["exact", "intersection", "interpolate"]
    steps: list[int]
    notes: list[str]


class SeedEvent(_Part):
    """When one run reached something; `formed` is false for a censored run, and `step` then the last one without it.

    `left_censored` says that the first measured checkpoint is past it already. `unconfirmed_step` is the checkpoint
    from which on a censored run seems to have it, with too few further ones to confirm it.
    """

    run: str
    step: int
    formed: bool
    left_censored: bool = False
    unconfirmed_step: int | None = None


class CurvePoint(_Part):
    """The share of seeds that have not formed something after a step, with 95 % limits."""

    step: int
    share: float
    low: float | None
    high: float | None


class EventEntry(_Part):
    """When something formed over seeds; `median` and its limits are by Kaplan and Meier, null where unknown."""

    split: str | None
    threshold: float | None
    formed: int
    total: int
    median: int | None
    median_low: int | None
    median_high: int | None
    curve: list[CurvePoint]
    runs: list[SeedEvent]


class PrecedenceEntry(_Part):
    """In how many seeds one metric moved before another, with a 95 % Wilson interval; `holds` if it is above 1/2."""

    first: str
    second: str
    before: int
    after: int
    undetermined: int
    share: float | None
    low: float | None
    high: float | None
    holds: bool


class OrderOfMetrics(_Part):
    """The order of onsets: pairs, and groups that every pair that holds agrees with (null if they contradict)."""

    pairs: list[PrecedenceEntry]
    consensus: list[list[str]] | None


class Leader(_Part):
    """A component by the accuracy that its ablation costs."""

    component: str
    accuracy_drop: float | None


class RunLeaders(_Part):
    """The leading components of a run at its best checkpoint."""

    run: str
    step: int
    ranked_by: str
    heads: list[Leader]
    mlps: list[Leader]


class SpreadEntry(_Part):
    """One number per seed: median, range and deviation; `sampling_share` of its variance comes from the sequences."""

    values: dict[str, float | None]
    median: float | None
    low: float | None
    high: float | None
    deviation: float | None
    sampling_share: float | None


class RoleWinner(_Part):
    """The head with the largest score of a role in a run, and the runner-up's score."""

    run: str
    component: str | None
    score: float
    second_score: float


class NullEntry(_Part):
    """What chance gives: mean, 95th percentile, and the probability of the observed value or a larger one."""

    mean: float | None
    high: float | None
    probability: float | None


class ObservedEntry(_Part):
    """A statistic of a match, and its null."""

    observed: float | None
    null: NullEntry


class MatchPart(_Part):
    """Which head of one run answers to each head of another, by the overlap of role scores.

    `similarity` is the matched overlap over what either run has; `address` its share at equal (layer, head).
    """

    heads: dict[str, str]
    overlap: dict[str, float]
    similarity: ObservedEntry
    address: ObservedEntry


class MatchEntry(MatchPart):
    """The match of `run_a` and `run_b` across layers, and the same with heads kept within their layers."""

    run_a: str
    run_b: str
    within_layers: MatchPart


class StabilityEntry(_Part):
    """The mean of a statistic over all pairs of runs, and its null."""

    mean: float | None
    null: NullEntry


class RolesEntry(_Part):
    """Roles over seeds.

    `evidence` says what effects were made of. `stage` is where runs are compared: the metric whose birth it is, or
    `last`; `stage_reason` says why. `steps` lists the checkpoints of each run there, over which scores are averaged.
    """

    evidence: Literal["ablation", "interventions"]
    stage: str
    stage_reason: str
    steps: dict[str, list[int]]
    winners: dict[str, list[RoleWinner]]
    role_stability: StabilityEntry
    address_stability: StabilityEntry


class OutlierEntry(_Part):
    """What sets a run apart from the others."""

    run: str
    what: str
    found: float | None
    others_low: float | None
    others_high: float | None


class Comparison(_Part):
    """`comparison.json`.

    `story` holds each run's phases and handovers, `arrays` the hash of `comparison.nc`, `files` those of the page and
    the figures by their names (older versions did not record them), `content_sha256` the hash of all else.
    """

    schema_version: int
    runs: list[ComparedRun]
    alignment: AlignmentEntry
    births: dict[str, EventEntry]
    half_rises: dict[str, EventEntry]
    stabilization: dict[str, EventEntry]
    order: OrderOfMetrics
    story: dict[str, dict[str, Any]]
    leaders: list[RunLeaders]
    accuracy: dict[str, dict[str, SpreadEntry]]
    probes: dict[str, SpreadEntry]
    roles: RolesEntry
    matching: list[MatchEntry]
    outliers: list[OutlierEntry]
    notes: list[str]
    findings: list[str]
    settings: dict[str, Any]
    versions: dict[str, str]
    arrays: FileHash
    files: dict[str, FileHash] = {}
    content_sha256: str = ""


def write_comparison(path: Path, document: dict[str, Any], *, replace: Replace = replace_file) -> None:
    """Checks the document against its schema and writes it atomically."""
    checked = Comparison.model_validate(document)
    write_json(path, sealed(checked.model_dump(mode="json", exclude={"content_sha256"})), replace=replace)


def read_comparison(path: Path) -> Comparison:
    """Reads a comparison.

    Raises:
      InputError: the file is missing, does not fit the schema, or was edited.
    """
    document = read_json(path)
    try:
        found = Comparison.model_validate(document)
    except pydantic.ValidationError as error:
        raise misfit(path, error, "a comparison of runs (run kvjax compare-seeds)") from None
    check_seal(document, path, "run kvjax compare-seeds again")
    return found
