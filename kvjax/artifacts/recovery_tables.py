"""Reads what activation patching of a run recovered, component by component and step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvjax.artifacts.results import Intervention, RunResults
from kvjax.errors import InputError

if TYPE_CHECKING:
    import xarray as xr

PATCHING = "activation_patching"


def component_recoveries(results: RunResults, *, metric: str = "logit_difference") -> xr.Dataset | None:
    """Joins what every window's activation patching recovered by component, each step by its newest measurement.

    Components are patched at all positions, denoising: the corrupted run gets the clean run's output.

    Args:
      results: of a run. Damaged results, and those of older versions, are left out.
      metric: whose recoveries, such as `answer_loss`.

    Returns:
      None if no window has any. Otherwise, along `step`, `pair_kind` and `component` (`L1H3`, `L1.mlp`), and where a
      number has an interval along `statistic` (`estimate`, `low`, `high`):

      - `recovery`: 1 is everything, 0 nothing; NaN if the runs do not differ;
      - `clean_answer_accuracy`: of the patched run;
      - `metric_of_runs` [run] and `answer_accuracy_of_runs` [answer, run]: of the clean and the corrupted run
        without intervention, answering as in the clean or in the corrupted stream;
      - `clean_run_fails` [failure]: whether a recovery is one of nothing, and why;
      - `window` [step]: the name of the measurement.
    """
    import xarray as xr

    by_step: dict[int, xr.Dataset] = {}
    for path in sorted(results.intervention_files(PATCHING), key=lambda path: path.stat().st_mtime_ns):
        try:
            found = Intervention.open(path)
            dataset = found.dataset
        except InputError:
            continue
        if "is_component" not in dataset.coords:
            continue
        table = _of_components(dataset, metric).assign(window=("step", [found.window] * dataset.sizes["step"]))
        by_step |= {int(step): table.sel(step=[step]) for step in table["step"].values}
    if not by_step:
        return None
    return xr.concat([by_step[step] for step in sorted(by_step)], "step", join="outer")


def _of_components(dataset: xr.Dataset, metric: str) -> xr.Dataset:
    own = dataset.sel(metric=metric, direction="denoising", position_role="all")
    own = own.isel(place=np.flatnonzero(own["is_component"].values))
    table = own[["metric_of_runs", "answer_accuracy_of_runs", "clean_run_fails"]].drop_dims("place", errors="ignore")
    for name in ("recovery", "clean_answer_accuracy"):
        table[name] = own[f"{name}_by_role"].rename(place="component").drop_vars("is_component")
    table.attrs = {"metric": metric}
    return table.drop_vars(["direction", "position_role"], errors="ignore")
