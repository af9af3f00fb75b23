"""Orders heads and MLPs on every split by the accuracy that their ablation costs, and follows how the order changes."""

from __future__ import annotations

import numpy as np
import xarray as xr

from kvjax.measure.between_checkpoints import rank_correlation_to_previous, turnover_from_previous
from kvjax.measure.statistics import places

# Component -> how many of its kind make up the top, of all there are.
_TOP = {"head": lambda heads: max(1, heads // 4), "mlp": lambda mlps: 1}


def component_orders(drops: xr.Dataset, ranked_by: str) -> dict[str, np.ndarray]:
    """Ranks components on every split (docs/definitions.md, "Dynamics").

    Args:
      drops: `head_accuracy_drop` and `mlp_accuracy_drop`, with the dimensions step, split and ablation.
      ranked_by: the kind of ablation that ranks.

    Returns:
      `head_rank` [C, splits, L, H] and `mlp_rank` [C, splits, L], from 1, NaN if the drop does not exist; and of each
      kind of component `…_rank_correlation_prev` and `…_turnover` [C, splits].
    """
    found = {}
    for component, top_of in _TOP.items():
        of_kind = drops[f"{component}_accuracy_drop"].sel(ablation=ranked_by).transpose("step", "split", ...).values
        flat = of_kind.reshape(*of_kind.shape[:2], -1)  # [C, splits, components]
        ranks = np.array([[places(at_split) for at_split in at_step] for at_step in flat], float)
        found[f"{component}_rank"] = np.where(np.isnan(flat), np.nan, ranks).reshape(of_kind.shape)
        found[f"{component}_rank_correlation_prev"] = rank_correlation_to_previous(flat.swapaxes(0, 1)).T
        top = top_of(flat.shape[-1])
        turnovers = [turnover_from_previous(at_split, top) for at_split in flat.swapaxes(0, 1)]
        found[f"{component}_turnover"] = np.stack(turnovers, axis=1)
    return found
