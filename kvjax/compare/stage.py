"""Chooses the stage of training at which the roles of heads are compared, so that every run has come equally far.

Two runs at one step may be far apart: one has formed its lookup, the other has not begun. A birth that both have
reached is comparable progress (docs/definitions.md, "Roles").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax.artifacts.birth_windows_schema import BirthEntry
from kvjax.compare.aligned import SweptRun
from kvjax.compare.events import births
from kvjax.compare.settings import LAST, LATEST_BIRTH
from kvjax.errors import bad_argument, command
from kvjax.story.confirmations import KIND

# Births that say that the model answers. Others come before anything is looked up, when no head has a role.
ANSWERING = ("answer_accuracy", "heldout_answer_accuracy", "w")


@dataclasses.dataclass(frozen=True)
class Stage:
    """Checkpoints at which runs have come equally far.

    Attributes:
      name: the metric whose birth it is, or `last`.
      steps: of each run by name: the checkpoints that its birth rests on, or its last one.
      patched: whether causal effects are recoveries by patching there; else they are drops by ablation.
      reason: in words, why this stage.
      notes: what a reader should know of it.
    """

    name: str
    steps: Mapping[str, Sequence[int]]
    patched: bool
    reason: str
    notes: Sequence[str] = ()


def choose_stage(runs: Sequence[SweptRun], asked: str, patched: Mapping[str, Sequence[int]]) -> Stage:
    """Chooses the stage that was asked for, or the latest that all runs have in common.

    Of births that every run has reached, `latest_birth` takes the latest at which every run is patched, and without one
    the latest by median step, where ablations stand in. Without such a birth it takes the last checkpoints.

    Args:
      runs: to be compared.
      asked: `latest_birth`, `last`, or the metric whose birth is meant.
      patched: the steps of each run that are patched with every kind of pair that a role asks for.

    Raises:
      InputError: the birth that was asked for is unknown, or some run has not reached it.
    """
    common = _common_births(runs)
    if asked == LATEST_BIRTH:
        why = "the latest that every run has reached"
        options = [_birth_stage(runs, name, common, why) for name in common if name in ANSWERING]
        options = options or [_last_stage(runs, "no birth of an answer is common to all runs")]
    elif asked == LAST:
        options = [_last_stage(runs, "as asked")]
    elif asked in common:
        options = [_birth_stage(runs, asked, common, "as asked")]
    else:
        raise bad_argument("stage", _expected(runs, asked, common), asked)
    return _with_patching(options, patched, runs)


def _with_patching(options: Sequence[Stage], patched: Mapping[str, Sequence[int]], runs: Sequence[SweptRun]) -> Stage:
    """Takes the first stage at which every run is patched, else the first of all; notes what patching is missing."""
    first, lacking = options[0], None
    for stage in options:
        steps = {name: [step for step in own if step in patched[name]] for name, own in stage.steps.items()}
        without = [one for one in runs if not steps[one.name]]
        if not without:
            found = dataclasses.replace(stage, steps=steps, patched=True)
            if lacking is None:
                return found
            reason = f"{stage.reason.partition(',')[0]}, the latest at which every run is patched"
            return dataclasses.replace(found, reason=reason, notes=[f"roles are not compared at the later {lacking}"])
        lacking = lacking or _lacking(stage, without)
    if not any(one.results.intervention_files(KIND) for one in runs):
        return first
    return dataclasses.replace(first, notes=[f"roles rest on ablations, not on patching, at the {lacking}"])


def _lacking(stage: Stage, without: Sequence[SweptRun]) -> str:
    """Says which runs lack patching at a stage, and how one of them gets it."""
    one = without[0]
    steps = ",".join(map(str, stage.steps[one.name]))
    remedy = command("intervene", run_dirs=[one.run.path], steps=steps, kinds=KIND)
    names = ", ".join(other.name for other in without)
    what = "last checkpoints" if stage.name == LAST else f"birth of {stage.name}"
    return f"{what}, where these runs are not patched: {names} (run {remedy})"


def _common_births(runs: Sequence[SweptRun]) -> dict[str, dict[str, Any]]:
    """Finds the births that every run has reached, and that none had before its first checkpoint; the latest first."""
    common = {
        name: entry
        for name, entry in births(runs).items()
        if entry["formed"] == len(runs) and not any(one["left_censored"] for one in entry["runs"])
    }
    return dict(sorted(common.items(), key=lambda item: -item[1]["median"]))


def _birth_stage(runs: Sequence[SweptRun], name: str, common: Mapping[str, Mapping[str, Any]], why: str) -> Stage:
    """Takes from each run the checkpoints that its birth rests on: where it is seen, and those that confirm it."""
    steps = {}
    for one in runs:
        first = one.steps.index(_birth(one, name).step)
        steps[one.name] = one.steps[first : first + 1 + one.results.windows.config["persistence"]]
    entry = common[name]
    return Stage(name, steps, False, f"the birth of {name} (≥ {entry['threshold']:g} on {entry['split']}), {why}")


def _last_stage(runs: Sequence[SweptRun], why: str) -> Stage:
    return Stage(LAST, {one.name: one.steps[-1:] for one in runs}, False, f"each run's last checkpoint ({why})")


def _expected(runs: Sequence[SweptRun], asked: str, common: Mapping[str, Any]) -> str:
    choices = ", ".join((LATEST_BIRTH, LAST, *common))
    known = [one for one in runs if asked in one.results.windows.births]
    if not known:
        return f"one of {choices}"
    without = ", ".join(one.name for one in known if _birth(one, asked).step is None)
    return f"one of {choices}, for {without or 'some run'} has not come from below to the birth of {asked}"


def _birth(one: SweptRun, name: str) -> BirthEntry:
    return one.results.windows.births[name]
