"""What a factor of a screen changes, beside what seeds change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xarray as xr

from kvjax.report.factor_charts import factor_charts
from kvjax.report.factor_page import factor_parts, factor_title
from kvjax.report.parts import Part, Section


def factor_section(document: Mapping[str, Any], trajectories: Mapping[str, xr.Dataset]) -> Section:
    """Shows the comparison of a factor's settings: the findings in words, charts, then the tables."""
    findings, *others = factor_parts(document)
    return Section(
        f"factor-{document['factor']}",
        f"Factor {factor_title(document)}",
        "One factor varied around the base: what it changes, and whether that is more than what seeds change.",
        [findings, Part("Settings over training", charts=factor_charts(document, trajectories)), *others],
    )
