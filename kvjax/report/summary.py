"""Writes a run's results as a short piece of HTML, which a notebook shows in place of the object."""

from __future__ import annotations

import markupsafe

from kvjax.artifacts.results import RunResults
from kvjax.errors import InputError, command
from kvjax.report.sections.overview import headline
from kvjax.story.text import summary_lines


def summary_html(results: RunResults) -> str:
    """Writes the run's name, its numbers at the last checkpoint, and its story in short; input is escaped.

    What is missing is named with the command that makes it.
    """
    config = results.run.config
    title = config.run_name if config.seed is None else f"{config.run_name}, seed {config.seed}"
    rows = markupsafe.Markup("").join(
        markupsafe.Markup("<tr><th style='text-align:left'>{}</th><td>{}</td></tr>").format(label, value)
        for label, value in headline(results)
    )
    try:
        told = summary_lines(results.story)
    except InputError as error:
        told = [str(error)]
    lines = markupsafe.Markup("").join(markupsafe.Markup("<li>{}</li>").format(line) for line in told)
    page = command("report", run_dirs=[results.run.path])
    return markupsafe.Markup(
        "<div><b>{}</b><table>{}</table><ul>{}</ul><p>All of it as a page: <code>{}</code></p></div>"
    ).format(title, rows, lines, page)
