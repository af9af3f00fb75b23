"""What happened, in words, and who carried the answers when."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvjax.artifacts.results import RunResults
from kvjax.artifacts.story_schema import ShareTrajectory, Story
from kvjax.report.charts.description import COLOURS, Line, LineChart
from kvjax.report.leaders import ablation_in_words
from kvjax.report.parts import Part, Section, section
from kvjax.report.sections.run_data import window_bands
from kvjax.story.text import sections as told_sections

_MOST_LINES = 6


def story_section(results: RunResults) -> Section:
    """Tells the story of a run: in short first, then each phase and handover with its intervals, then how sure."""
    return section(
        "story",
        "What happened",
        "What formed, when, who carried it, who handed over to whom, and how sure that is.",
        lambda: _parts(results, results.story),
    )


def _parts(results: RunResults, story: Story) -> list[Part]:
    first, *others = told_sections(story)
    charts = share_charts(results)
    return [
        Part(first.title, first.lines, charts),
        *(Part(part.title, part.lines, folded=not part.title.startswith("How sure")) for part in others),
    ]


def share_charts(results: RunResults) -> list[LineChart]:
    """Draws which share of all drops each leading head, and each MLP, has at every checkpoint."""
    story = results.story
    levels = {
        "heads": [own for own in story.shares[story.ablation] if not own.component.endswith(".mlp")],
        "MLPs": [own for own in story.shares[story.ablation] if own.component.endswith(".mlp")],
    }
    return [_shares(results, story, level, own) for level, own in levels.items() if own]


def _shares(results: RunResults, story: Story, level: str, shares: Sequence[ShareTrajectory]) -> LineChart:
    steps = np.array(story.steps)
    leading = sorted(shares, key=lambda own: -max((one or 0.0 for one in own.share), default=0.0))[:_MOST_LINES]
    numbers = {name: [np.array(getattr(own, name), float) for own in leading] for name in ("share", "low", "high")}
    lines = [
        Line(own.component, steps, share, low, high, COLOURS[place % len(COLOURS)])
        for place, (own, share, low, high) in enumerate(zip(leading, *numbers.values(), strict=True))
    ]
    return LineChart(
        name=f"shares_{level.lower()}",
        title=f"Which {level} carry the answers",
        caption=f"Share of each of the {len(lines)} leading {level} in what {ablation_in_words(story.ablation)} "
        "ablations cost together, with 95 % intervals. A gap: no ablation costs enough. Shaded: birth windows.",
        lines=lines,
        y_title="share of accuracy drop",
        y_range=(-0.03, 1.03),
        bands=window_bands(results),
    )
