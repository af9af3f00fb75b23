"""What commands print of a story."""

from __future__ import annotations

import textwrap

from kvjax.artifacts.story_schema import Story
from kvjax.report.text import say
from kvjax.story.text import story_lines, summary_lines

_WIDTH = 110


def print_story(story: Story, *, in_full: bool) -> None:
    """Prints what happened in a run: a sentence for each phase and handover, or all of it."""
    lines = story_lines(story) if in_full else [f"- {line}" for line in summary_lines(story)]
    for line in lines:
        bullet = "  " if line.startswith("- ") else ""
        unbroken = line.replace(" %", "\u00a0%")  # at which no line breaks
        for part in textwrap.wrap(unbroken, _WIDTH, initial_indent="  ", subsequent_indent=f"  {bullet}") or [""]:
            say(part.replace("\u00a0%", " %"))
