"""Check, write and read `story.json`: what happened in a run, as phases and handovers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pydantic

from kvjax.artifacts.files import read_json, replace_together, write_json
from kvjax.artifacts.identity import check_seal, sealed
from kvjax.artifacts.layout import RunLayout
from kvjax.errors import misfit, unusable

Ends = tuple[float, float]

REMEDY = "run kvjax birth-windows again"


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Change(_Part):
    """A number at two checkpoints with 95 % intervals; `interval` is that of the change. Null if it does not exist."""

    before: float | None
    before_interval: Ends | None
    after: float | None
    after_interval: Ends | None
    change: float | None
    interval: Ends | None

    @property
    def holds(self) -> bool:
        """Checks whether the interval of the change leaves out 0."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


class Distance(_Part):
    """Accuracy of the reads whose support stands `tokens` (first to last) tokens before their answer."""

    tokens: tuple[int, int]
    reads: int
    before: float | None
    after: float | None


class Reach(_Part):
    """How far back reads are answered: the longest distance up to which accuracy is half that of the best or more.

    Null at a checkpoint that nothing carries. `longest` is the longest distance measured.
    """

    before: int | None
    before_interval: tuple[int, int] | None
    after: int | None
    after_interval: tuple[int, int] | None
    longest: int
    distances: list[Distance]


class Carrier(_Part):
    """A component at the end of a phase: its share and the drop it comes from, each with its 95 % interval."""

    component: str
    share: float
    share_interval: Ends
    drop: float
    drop_interval: Ends


class Component(_Part):
    """How the drop and the share of a component changed across a phase."""

    component: str
    drop: Change
    share: Change


class Moved(_Part):
    """A metric that moved in a phase: its largest shift, `size` in its own unit, at `step`."""

    metric: str
    split: str
    step: int
    size: float
    score: float


class Confirmation(_Part):
    """What patching one component from the clean into the corrupted run recovers, by kind of pair.

    `confirmed` says that the interval lies above 0 and the recovery is a tenth of the gap or more. `recovery` is null
    if the clean and the corrupted run do not differ, so that nothing can be recovered.
    """

    component: str
    kind: str
    step: int
    recovery: float | None
    interval: Ends | None
    confirmed: bool


class Phase(_Part):
    """Windows that belong together, told as one (docs/definitions.md, "Phases and handovers").

    Attributes:
      windows: the centre steps of its windows.
      between: its first and last step.
      steps: the checkpoints in it.
      rose, fell: behaviour and attention that shifted.
      carriers_before, carriers: of heads, at its ends, the largest share first.
      carriers_by_zero: the carriers that zero ablation names at its end.
      mlps: the MLPs that carry at its end; shares among MLPs.
      components: heads and MLPs whose drop changed by more than the floor and its interval.
      accuracy: by split.
      reach: by split.
      confirmations: by interventions; empty before there are any.
    """

    windows: list[int]
    between: tuple[int, int]
    steps: list[int]
    rose: list[Moved]
    fell: list[Moved]
    carriers_before: list[Carrier]
    carriers: list[Carrier]
    carriers_by_zero: list[str]
    mlps: list[Carrier]
    components: list[Component]
    accuracy: dict[str, Change]
    reach: dict[str, Reach]
    confirmations: list[Confirmation] = []


class Movement(_Part):
    """How the share of one component of a handover moved.

    Attributes:
      component: its name.
      share: before and after; `before` is the peak of one that hands over.
      share_by_zero: the same by zero ablation.
      midpoint: the step at which the movement is halfway.
      interval: the checkpoints between which the midpoint lies, whichever sequences are drawn.
      held_from: the checkpoint from which on the component has handed or taken over.
      further_checkpoints: later ones at which that is seen as well.
    """

    component: str
    share: Change
    share_by_zero: Change
    midpoint: float
    interval: tuple[int, int]
    held_from: int
    further_checkpoints: int


class HandoverEntry(_Part):
    """One set of components hands the behaviour to another.

    Attributes:
      from_components, to_components: their names (`from` and `to` in the file).
      between: the checkpoints that the midpoints of all movements lie between.
      windows: the centres of the windows it lies between; null for an end of the trajectory.
      level: `head` or `mlp`.
      movements: of all of them, those who hand over first.
      support: share of resamples in which all conditions hold at once.
      persisted: whether it was seen to hold for `persistence` further checkpoints; if not, the trajectory ends before.
      measured_at: the steps that accuracy and reach are compared at.
      accuracy: by split.
      reach: by split.
      confirmations: by interventions; empty before there are any.
    """

    from_components: list[str] = pydantic.Field(alias="from")
    to_components: list[str] = pydantic.Field(alias="to")
    between: tuple[int, int]
    windows: tuple[int | None, int | None]
    level: Literal["head", "mlp"]
    movements: list[Movement]
    support: float
    persisted: bool
    measured_at: tuple[int, int]
    accuracy: dict[str, Change]
    reach: dict[str, Reach]
    confirmations: list[Confirmation] = []

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_by_name=True, validate_by_alias=True
    )


class ShareTrajectory(_Part):
    """The share of one component at every step, with its interval; null where nothing carries."""

    component: str
    share: list[float | None]
    low: list[float | None]
    high: list[float | None]


class ToldFrom(_Part):
    """What the story is made from: windows by their `content_sha256`, interventions by `<kind>/<window>` and arrays."""

    windows_sha256: str
    interventions: dict[str, str]


class Story(_Part):
    """`analysis/story.json` (docs/formats.md).

    Attributes:
      ablation: the kind of ablation that shares are of.
      persistence: further checkpoints at which a handover must hold.
      floor: smallest drop that means anything.
      steps: of the checkpoints that it covers.
      planned_steps: last step that training is to reach.
      reads: number of reads, and `sequences` of streams, of the probe set.
      chance: accuracy of guessing a value; null if unknown.
      accuracy: by split, at every step.
      shares: by kind of ablation, of every head and every MLP.
      untold: why a window is no phase of the story.
      notes: what a reader must know.
    """

    schema_version: int
    run_name: str
    seed: int | None
    told_from: ToldFrom
    verdict: Literal["windows", "no transition", "undecidable"]
    reason: str
    complete: bool
    ablation: str
    persistence: int
    floor: float
    steps: list[int]
    planned_steps: int
    sequences: int
    reads: int
    chance: float | None
    accuracy: dict[str, list[float | None]]
    phases: list[Phase]
    handovers: list[HandoverEntry]
    shares: dict[str, list[ShareTrajectory]]
    untold: list[str]
    notes: list[str]
    content_sha256: str = ""


def write_story(layout: RunLayout, story: Story, text: str) -> Story:
    """Writes the story and its text together, and returns it with the hash of its content."""
    document = sealed(story.model_dump(mode="json", by_alias=True, exclude={"content_sha256"}))
    with replace_together() as files:
        with files.file(layout.story_text) as partial:
            partial.write_text(text, encoding="utf-8")
        write_json(layout.story, document, replace=files.file)
    return Story.model_validate(document)


def read_story(path: Path) -> Story:
    """Reads a run's story.

    Raises:
      InputError: the file is missing, does not fit the schema, or was edited.
    """
    expected = f"the story of a run ({REMEDY})"
    if not path.is_file():
        raise unusable(path, expected, "no such file")
    document = read_json(path)
    try:
        found = Story.model_validate(document)
    except pydantic.ValidationError as error:
        raise misfit(path, error, expected) from None
    check_seal(document, path, REMEDY)
    return found
