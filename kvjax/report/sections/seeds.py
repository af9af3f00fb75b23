"""What repeats across runs: seeds overlaid, births with censoring, roles wherever their heads are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import xarray as xr

from kvjax.report.comparison_charts import comparison_charts
from kvjax.report.comparison_page import comparison_parts
from kvjax.report.parts import Part, Section, Table


def seeds_section(document: Mapping[str, Any], dataset: xr.Dataset) -> Section:
    """Shows a comparison of runs: the findings in words, charts of all runs together, then the tables."""
    findings, *others = comparison_parts(document)
    charts = comparison_charts(document, dataset)
    return Section(
        "seeds",
        "Across seeds",
        "What repeats whatever the seed, what differs, and which heads have the same role at other addresses.",
        [
            findings,
            Part("All runs together", charts=[chart for chart in charts if not chart.name.startswith("role_")]),
            Part(
                "Roles, wherever their heads are", charts=[chart for chart in charts if chart.name.startswith("role_")]
            ),
            *others,
        ],
    )


def runs_section(headlines: Mapping[str, Sequence[tuple[str, str]]]) -> Section:
    """Lists the runs with the numbers at the top of each one's page."""
    labels = list(dict.fromkeys(label for own in headlines.values() for label, _ in own))
    shown = [label for label in labels if not label.startswith("handover")]
    rows = []
    for name, own in headlines.items():
        numbers = dict(own)
        handed = "; ".join(
            f"{value} ({label.removeprefix('handover, ')})" for label, value in own if label not in shown
        )
        rows.append([name, *(numbers.get(label) for label in shown), handed or None])
    table = Table("", ["run", *shown, "handovers"], rows)
    return Section("runs", "Runs", "Each run at its last checkpoint.", [Part(tables=[table])])
