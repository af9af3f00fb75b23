"""The story of a run: written with its birth windows, completed by interventions, printed by `status`."""

from __future__ import annotations

import dataclasses

from kvjax.artifacts.results import RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.story_schema import Story, write_story
from kvjax.errors import InputError, command, note
from kvjax.pipeline.current import Current
from kvjax.story.build import build_story
from kvjax.story.confirmations import interventions_of, with_confirmations
from kvjax.story.text import story_markdown


def tell_story(results: RunResults) -> Story:
    """Tells what happened in a run from its sweep, its windows and the interventions there are, and writes it.

    Raises:
      InputError: the run has no sweep, or no birth windows of it, that can be read.
    """
    return _write(results, _told(results))


def complete_story(run: RunDir) -> None:
    """Tells the story of a run again after interventions.

    If they were forced on a run without birth windows of its sweep, there is nothing to tell; a note says so.

    Raises:
      InputError: the story cannot be written.
    """
    if story_is_current(run).holds:
        return
    results = RunResults(run)
    try:
        story = _told(results)
    except InputError as error:
        note(f"{run.path}: its story is not told: {error}")
    else:
        _write(results, story)


def _told(results: RunResults) -> Story:
    return with_confirmations(build_story(results), results)


def _write(results: RunResults, story: Story) -> Story:
    return write_story(results.run.layout, story, story_markdown(story))


@dataclasses.dataclass(frozen=True)
class StoryState:
    """The story of a run as `status` shows it.

    Attributes:
      current: whether it is of the windows and interventions there are.
      story: the story; None if there is none of these windows.
    """

    current: Current
    story: Story | None


def story_state(run: RunDir) -> StoryState:
    """Reads the story of a run and says whether anything was found or measured since it was told."""
    rerun, results = command("birth-windows", run_dirs=[run.path]), RunResults(run)
    try:
        story = results.story
    except InputError as error:
        return StoryState(Current(False, str(error), rerun), None)
    if story.told_from.interventions != interventions_of(results):
        return StoryState(Current(False, "interventions were measured again since it was told", rerun), story)
    return StoryState(Current(True, f"{run.layout.story_text} tells it"), story)


def story_is_current(run: RunDir) -> Current:
    """Says whether the story of a run is of its birth windows and interventions as they are."""
    return story_state(run).current
