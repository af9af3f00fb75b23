"""Which interventions are made, and where, as whoever starts them chooses."""

from __future__ import annotations

import dataclasses

from kvjax.config.settings import Settings, setting
from kvjax.errors import bad_argument
from kvjax.intervene.ablations import ABLATIONS, DEFAULT_ABLATION
from kvjax.intervene.kinds import KINDS
from kvjax.intervene.metrics import DEFAULT_METRIC, METRICS


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterventionSettings(Settings):
    """Kinds of intervention, the checkpoints they are made in, and how."""

    window: str = setting("all", "Window to intervene in: all, or the center step of one.")
    steps: str | None = setting(
        None, "Checkpoints to take instead of windows: all, or steps and ranges such as 250,1000-4000."
    )
    kinds: tuple[str, ...] = setting(KINDS, "Kinds of intervention.", choices=KINDS)
    pairs_per_kind: int | None = setting(None, "Pairs of each kind to use, the first; by default all 96.", minimum=2)
    components: tuple[str, ...] | None = setting(
        None,
        "Components, such as L1H3,L1.mlp, whose set is tested for sufficiency; by default the smallest faithful set.",
    )
    metric: str = setting(
        DEFAULT_METRIC,
        "Metric whose recoveries are ranked and printed. Patching stores all of them; necessity ranks components, and "
        "attribution takes gradients, by this one.",
        choices=tuple(METRICS),
    )
    rank_by: str = setting(
        DEFAULT_ABLATION,
        "Ablation whose cost ranks components for necessity, and under which the smallest faithful set is found.",
        choices=ABLATIONS,
    )
    precision: str = setting(
        "highest",
        "Precision of float32 matrix products; default lets a GPU use TF32.",
        choices=("highest", "default"),
    )
    force: bool = setting(False, "Go on although the run is not ready for circuit work (kvjax status).")
    overwrite: bool = setting(False, "Measure all of it again, also if an earlier call had other settings.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kinds:
            raise bad_argument("kinds", f"kinds among {', '.join(KINDS)}", "none")
        if self.steps is not None and self.window != "all":
            raise bad_argument("window", "no window beside `steps`", self.window)
