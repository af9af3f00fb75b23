"""What the output of an ablated component is replaced by (docs/definitions.md, "Interventions")."""

from __future__ import annotations

ABLATIONS = ("zero", "mean", "role_mean", "resample")

# By this one sets are ranked and judged. It leaves a component all that it writes by the kind of token alone.
DEFAULT_ABLATION = "role_mean"


def measured_ablations(ranked_by: str) -> tuple[str, ...]:
    """Lists the ablations that sets are measured under: the mean over all tokens only if it ranks."""
    return tuple(name for name in ABLATIONS if name != "mean" or ranked_by == name)
