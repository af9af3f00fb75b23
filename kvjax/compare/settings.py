"""How runs are compared, as whoever starts it chooses."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvjax.config.settings import Settings, setting

ALIGNMENTS = ("exact", "intersection", "interpolate")
LATEST_BIRTH, LAST = "latest_birth", "last"  # stages; any other is the metric of a birth


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareSettings(Settings):
    """How runs stand side by side."""

    align: str = setting(
        "exact",
        "Runs with other steps or planned lengths: refuse them, compare at the steps that all have, or interpolate.",
        choices=ALIGNMENTS,
    )
    allow_other_probe_sets: bool = setting(
        False, "Compare runs measured on different probe sets too; no statistic then pairs their sequences."
    )
    stage: str = setting(
        LATEST_BIRTH,
        "Where roles are compared: at the latest birth of an answer that all runs have reached, at the last checkpoint "
        "(last), or at the birth of a metric, such as heldout_answer_accuracy.",
    )
    null_draws: int = setting(
        1000, "Draws of the nulls that matched roles and addresses are compared with.", minimum=20, maximum=1_000_000
    )

    @property
    def recorded(self) -> dict[str, Any]:
        """The settings as a comparison records them."""
        return dataclasses.asdict(self)
