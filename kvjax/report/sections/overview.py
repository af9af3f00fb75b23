"""A run at a glance: its numbers at the end, and the sentences that answer what, when, who and how sure."""

from __future__ import annotations

import numpy as np

from kvjax.artifacts.results import RunResults
from kvjax.artifacts.story_schema import Story
from kvjax.errors import InputError
from kvjax.measure.registry import BIRTH_SPLIT
from kvjax.report.sections.run_data import splits_of


def headline(results: RunResults) -> list[tuple[str, str]]:
    """Collects (label, number) pairs for the top of a run's page, as far as its results exist."""
    try:
        dataset, intervals = results.metrics, results.intervals
    except InputError:
        return []
    last = int(dataset["step"].values[-1])
    facts = [("checkpoints", f"{dataset.sizes['step']}, to step {last}")]
    for split in splits_of(dataset)[:2]:
        estimate, low, high = (
            float(intervals["answer_accuracy"].sel(split=split, statistic=name).values[-1])
            for name in ("estimate", "low", "high")
        )
        if np.isfinite(estimate):
            facts.append((f"accuracy, {split}", f"{estimate:.3f} [{low:.3f}, {high:.3f}]"))
    return facts + _from_story(results)


def _from_story(results: RunResults) -> list[tuple[str, str]]:
    try:
        story, windows = results.story, results.windows
    except InputError:
        return []
    spans = ", ".join(f"{own.start_step} to {own.end_step}" for own in windows.windows)
    facts = [("birth windows", spans or story.verdict)]
    born = windows.births.get("answer_accuracy")
    if born is not None and born.split == BIRTH_SPLIT and born.threshold is not None:
        when = "not yet" if born.step is None else f"step {born.step}"
        facts.append((f"accuracy ≥ {born.threshold:g}", when))
    return facts + _carriers(story)


def _carriers(story: Story) -> list[tuple[str, str]]:
    facts = []
    if story.phases and story.phases[-1].carriers:
        own = story.phases[-1].carriers
        shares = ", ".join(f"{one.component} {one.share:.2f}" for one in own)
        facts.append(("carriers at the end (share)", shares))
    for one in story.handovers:
        after = "" if one.persisted else " (provisional)"
        names = f"{', '.join(one.from_components)} → {', '.join(one.to_components)}"
        facts.append((f"handover, steps {one.between[0]} to {one.between[1]}", names + after))
    return facts
