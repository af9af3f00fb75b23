"""What a sweep measures and how it runs, as whoever starts it chooses."""

from __future__ import annotations

import dataclasses

from kvjax.config.settings import Settings, setting
from kvjax.errors import bad_argument

ABLATIONS = ("zero", "mean", "resample", "random")
PRECISIONS = ("highest", "default")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepSettings(Settings):
    """What a sweep's numbers depend on beside probe set and checkpoints, and how the sweep runs.

    Without `ablations` only the clean run is measured, as an evaluation does; a sweep needs zero ablation.
    """

    ablations: tuple[str, ...] = setting(
        ("zero", "mean", "resample"),
        "Kinds of head and MLP ablation: zero (always), mean, resample, and random, a step as long, for scale.",
        choices=ABLATIONS,
    )
    resample_draws: int = setting(
        1, "Draws per resample ablation; drops are means over them.", minimum=1, maximum=10_000
    )
    probe: str = setting(
        "ridge",
        "Trained linear probes to fit; logistic adds multinomial logistic ones at the steps that `steps` names.",
        choices=("ridge", "logistic", "none"),
    )
    event_drift: bool = setting(True, "Measure drift of single reads' states and linear CKA too.")
    checkpoint_batch: str = setting("auto", "Checkpoints per device call: auto or a number.")
    memory_gb: float | None = setting(
        None,
        "Memory that `checkpoint_batch=auto` may fill: of each accelerator, or of the machine on a CPU.",
        above=0,
    )
    precision: str = setting(
        "highest", "Precision of float32 matrix products; default lets a GPU use TF32.", choices=PRECISIONS
    )
    contradiction: str = setting(
        "refuse",
        "If answers contradict the accuracies that a run recorded: refuse it, or note that and go on.",
        choices=("refuse", "note"),
    )
    skip_bad: bool = setting(False, "List unusable checkpoints and measure the others, instead of stopping.")
    overwrite: bool = setting(False, "Measure again, also if the earlier sweep had other settings.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ablations and "zero" not in self.ablations:
            found = ",".join(self.ablations)
            raise bad_argument("ablations", "zero among the kinds, for ranks are by zero ablation", found)
