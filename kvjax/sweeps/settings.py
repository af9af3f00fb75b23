"""What a sweep measures and how it runs, as whoever starts it chooses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kvjax.config.settings import Settings, setting
from kvjax.errors import bad_argument

ABLATIONS = ("zero", "mean", "role_mean", "resample", "random")
# Kinds that replace a component's output, so that their drops can rank components; `random` keeps it.
REPLACEMENTS = ABLATIONS[:-1]
WHY_ZERO = "which `accuracy_drop` and `top_heads_by_ablation` are by"
PRECISIONS = ("highest", "default")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepSettings(Settings):
    """What a sweep's numbers depend on beside probe set and checkpoints, and how the sweep runs.

    Without `ablations` only the clean run is measured, as an evaluation does; a sweep needs zero ablation.
    """

    ablations: tuple[str, ...] = setting(
        ("zero", "role_mean", "resample"),
        "Kinds of head and MLP ablation: zero (always), mean, role_mean (mean over tokens of the same role), resample, "
        "and random, a control: a random step the size of the component's write, nothing replaced.",
        choices=ABLATIONS,
    )
    rank_by: str | None = setting(
        None,
        "Kind of ablation that ranks components: by default role_mean if it is measured, else zero. Another kind draws "
        "the tables again and measures nothing again.",
        choices=REPLACEMENTS,
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
        "Memory that a sweep may take of each accelerator, which JAX else fills to three quarters when it starts; on a "
        "CPU, memory of the machine that `checkpoint_batch=auto` may fill.",
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
            raise bad_argument("ablations", f"zero among the kinds, {WHY_ZERO}", ",".join(self.ablations))
        if self.ablations and self.ranked_by not in self.ablations:
            measured = ", ".join(kind for kind in self.ablations if kind in REPLACEMENTS)
            raise bad_argument(
                "rank_by", f"one of the measured kinds {measured} (or add it to `ablations`)", self.rank_by
            )

    @property
    def ranked_by(self) -> str:
        """The kind of ablation that ranks components."""
        return self.rank_by or default_ranking(self.ablations)


def default_ranking(ablations: Sequence[str]) -> str:
    """Chooses the kind of ablation that ranks components if nobody names one: role means if measured, else zero.

    A zero takes away what an output says of the token's role as well, which a component may write at every token of
    the role alike. Such a constant carries no content, but what comes later may rely on it.
    """
    return "role_mean" if "role_mean" in ablations else "zero"
