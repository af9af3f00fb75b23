"""Puts the sections of one run's report together."""

from __future__ import annotations

from collections.abc import Mapping

from kvjax.artifacts.results import RunResults
from kvjax.report.html import RunPage
from kvjax.report.sections.attention import AttentionPatterns, attention_section
from kvjax.report.sections.behaviour import behaviour_section
from kvjax.report.sections.components import components_section
from kvjax.report.sections.interventions import interventions_section
from kvjax.report.sections.overview import headline
from kvjax.report.sections.provenance import provenance_section
from kvjax.report.sections.residual import change_section, probes_section
from kvjax.report.sections.story import story_section
from kvjax.report.sections.windows import windows_section
from kvjax.task.pairs import StreamPair


def run_page(
    results: RunResults,
    *,
    anchor: str,
    title: str,
    pairs: Mapping[str, StreamPair],
    attention: AttentionPatterns | None,
    why_no_attention: str | None,
) -> RunPage:
    """Puts a run's sections together, in the order of the questions: what, when, where, how, how sure.

    Args:
      results: of the run; a section whose results are missing names the command that makes them.
      anchor: of the run's place on the page.
      title: its name.
      pairs: the pairs of streams that interventions were measured on, by id.
      attention: patterns of chosen heads; None if they could not be computed.
      why_no_attention: the reason then.
    """
    return RunPage(
        anchor,
        title,
        headline(results),
        [
            story_section(results),
            behaviour_section(results),
            windows_section(results),
            components_section(results),
            interventions_section(results, pairs),
            attention_section(attention, why_no_attention),
            probes_section(results),
            change_section(results),
            provenance_section(results),
        ],
    )
