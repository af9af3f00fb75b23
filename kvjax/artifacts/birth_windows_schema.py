"""Check, write and read `birth_windows.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pydantic

from kvjax.artifacts.files import read_json, write_json
from kvjax.artifacts.identity import check_seal, sealed
from kvjax.errors import misfit, unusable

StepInterval = tuple[int | None, int | None]  # an end is None if it lies beyond the run


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TrajectoryBreak(_Part):
    """Two checkpoints that cannot be neighbours in one training run (docs/definitions.md, "Breaks in a trajectory").

    `copy`: both have the same parameters. `jump`: their embeddings are unrelated. `resumed`: training was interrupted
    between them.
    """

    kind: Literal["copy", "jump", "resumed"]
    before: int
    after: int
    reason: str


class BirthEntry(_Part):
    """When one metric was born on a split (docs/birth_windows.md).

    `censored` says that the run ends before the birth can be seen; `reason` says how. `unconfirmed_step` is the step
    from which on the metric is at its threshold in such a run, with too few further checkpoints; else null.
    `left_censored` says that the first measured checkpoint is past it already: it came at `step` or before. An end of
    an interval is null if it lies beyond the measured checkpoints. `provisional` says that the run has not reached its
    planned end: half-rises are to its last checkpoint, and may yet change.
    """

    split: str
    threshold: float | None
    step: int | None
    interval: StepInterval | None
    censored: bool
    unconfirmed_step: int | None = None
    left_censored: bool
    half_rise_step: int | None
    half_rise_interval: StepInterval | None
    reason: str
    provisional: bool = False


class TriggerEntry(_Part):
    """A level shift in a window: `size` in the metric's unit at `step`, the first checkpoint after it.

    `repeats` names the metric whose shift on the split it repeats, as the drop of a component without which nothing is
    answered repeats accuracy. Such a trigger is no evidence of its own.
    """

    kind: str
    metric: str
    split: str
    step: int
    size: float
    score: float
    repeats: str | None = None


class OrderEntry(_Part):
    """When a metric moved, and which way, in steps.

    Onset, midpoint and completion are interpolated. `onset_interval`, `interval` (the midpoint's) and
    `completion_interval` are what was observed: the checkpoints between which the moment lies, over 95 % of the
    resamples too. `between` are the two checkpoints around the midpoint.
    """

    metric: str
    split: str
    direction: Literal["rise", "fall"]
    onset: float | None
    midpoint: float | None
    completion: float | None
    interval: tuple[int, int] | None
    onset_interval: tuple[int, int] | None
    completion_interval: tuple[int, int] | None
    between: tuple[int, int] | None


class PrecedesEntry(_Part):
    """Probability that the first metric's midpoint precedes the second's.

    `undetermined` is the share of resamples in which both lie between the same two checkpoints, so that their order
    was not observed. These count half each way in `probability`.
    """

    first: str
    second: str
    probability: float
    undetermined: float


class ComponentEntry(_Part):
    """A head, or an MLP if `head` is null, by the accuracy that its ablation costs.

    `left_censored` says that `first_step_above_null` is the first measured checkpoint: it came there or before.
    """

    layer: int
    head: int | None
    importance_before: float
    importance_inside: float
    importance_after: float
    rank_before: int
    rank_inside: int
    rank_after: int
    first_step_above_null: int | None
    left_censored: bool


class ComponentChange(_Part):
    """A component whose importance moved one way in a window, with its levels before and after on each split."""

    component: str
    layer: int
    head: int | None
    splits: dict[str, tuple[float, float]]


class RampEntry(_Part):
    """Steady growth of a metric over many checkpoints, which makes no window; levels at both ends, in its unit."""

    kind: str
    metric: str
    split: str
    start_step: int
    end_step: int
    before: float
    after: float
    score: float


class WindowEntry(_Part):
    """One birth window; `center_step` is the first checkpoint after the largest shift.

    `rose` and `fell` are the components whose importance moved in it, the largest change first.
    """

    start_step: int
    center_step: int
    end_step: int
    steps: list[int]
    triggers: list[TriggerEntry]
    order: list[OrderEntry]
    precedes: list[PrecedesEntry]
    components: list[ComponentEntry]
    rose: list[ComponentChange]
    fell: list[ComponentChange]


class MeasuredOn(_Part):
    """The sweep that windows were found in; they are stale once it differs.

    `sweep_sha256` is the hash of the sweep's settings and checkpoints; files of older versions lack it.
    """

    probe_set_sha256: str
    steps: list[int]
    checkpoints_sha256: list[str]
    sweep_sha256: str | None = None


class BirthWindows(_Part):
    """`analysis/birth_windows.json` (docs/formats.md); `content_sha256` is the hash of all else.

    `ranked_by` is the kind of ablation whose drops triggers and components are of; older files are of zero ablation.
    """

    schema_version: int
    run_name: str
    verdict: Literal["windows", "no transition", "undecidable"]
    reason: str
    complete: bool
    measured_on: MeasuredOn
    ranked_by: str = "zero"
    config: dict[str, Any]
    births: dict[str, BirthEntry]
    windows: list[WindowEntry]
    ramps: list[RampEntry] = []
    breaks: list[TrajectoryBreak]
    content_sha256: str = ""


def write_birth_windows(path: Path, document: dict[str, Any]) -> None:
    """Checks the document against its schema and writes it atomically."""
    checked = BirthWindows.model_validate(document)
    write_json(path, sealed(checked.model_dump(mode="json", exclude={"content_sha256"})))


def read_birth_windows(path: Path) -> BirthWindows:
    """Reads a run's birth windows.

    Raises:
      InputError: the file is missing, does not fit the schema, or was edited.
    """
    expected = "birth windows (run kvjax birth-windows)"
    if not path.is_file():
        raise unusable(path, expected, "no such file")
    document = read_json(path)
    try:
        found = BirthWindows.model_validate(document)
    except pydantic.ValidationError as error:
        raise misfit(path, error, expected) from None
    if found.content_sha256:
        check_seal(document, path, "run kvjax birth-windows again")
    return found
