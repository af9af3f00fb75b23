"""Defines the settings of a sweep."""

from __future__ import annotations

import dataclasses
import math
import numbers

from kvjax.errors import bad_argument
from kvjax.sweeps.ablations import chosen_ablations


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """The settings of a sweep: what it measures, and how it runs.

    Attributes:
      precision: of matrix products, `highest` or `default`.
      ablations: kinds of ablation measured, of `ABLATIONS`; none for the clean run alone, which makes no tables.
      resample_draws: draws per resample ablation.
      probe: trained probes: `ridge`, `logistic` (ridge, and multinomial logistic at the named steps) or `none`.
      event_drift: whether drift of single events and linear CKA are measured.
      checkpoint_batch: `auto`, or checkpoints per device call.
      memory_gb: memory to use, of each accelerator or of the machine on a CPU; None for most of it.
      skip_bad: list unusable checkpoints instead of stopping at the first.
      overwrite: measure again what was measured already.
    """

    precision: str = "highest"
    ablations: tuple[str, ...] = ("zero", "mean", "resample")
    resample_draws: int = 1
    probe: str = "ridge"
    event_drift: bool = True
    checkpoint_batch: str | int = "auto"
    memory_gb: float | None = None
    skip_bad: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("precision", ("highest", "default")), ("probe", ("ridge", "logistic", "none"))):
            if getattr(self, name) not in allowed:
                raise bad_argument(name, f"one of {', '.join(allowed)}", getattr(self, name))
        draws, memory = self.resample_draws, self.memory_gb
        if not (isinstance(draws, numbers.Integral) and not isinstance(draws, bool) and draws >= 1):
            raise bad_argument("resample_draws", "a whole number of at least 1", draws)
        object.__setattr__(self, "resample_draws", int(draws))
        if memory is not None and not (isinstance(memory, numbers.Real) and 0 < memory < math.inf):
            raise bad_argument("memory_gb", "a number above 0", memory)
        if self.ablations:  # in one order, whatever order they were named in: results are found by them
            object.__setattr__(self, "ablations", chosen_ablations(self.ablations))
