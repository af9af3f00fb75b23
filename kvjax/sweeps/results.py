"""The records that the parts of a sweep hand on: what happened, what was measured, what was written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvjax.artifacts.checkpoint_sums import CheckpointResult
from kvjax.artifacts.results import RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.sweep_schema import Vouched
from kvjax.sweeps.fixed_margin import FixedMargins

if TYPE_CHECKING:
    import xarray as xr

NamedResult = tuple[str, CheckpointResult]


@dataclasses.dataclass
class SweepLog:
    """What happened while a run was swept.

    Attributes:
      measured, reused: steps of the checkpoints that this sweep measured, or found measured.
      refused: file name -> why that checkpoint cannot be used.
      unvouched: why no answers were compared with a recorded accuracy; None if some were, or nothing was measured.
      not_kept: why converted parameters could not be stored; None if they were.
      first_call_seconds: time of the first device call, which compiles; None if there was none.
      later_call_seconds: time of each later one.
    """

    measured: list[int] = dataclasses.field(default_factory=list)
    reused: list[int] = dataclasses.field(default_factory=list)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    unvouched: str | None = None
    not_kept: str | None = None
    first_call_seconds: float | None = None
    later_call_seconds: list[float] = dataclasses.field(default_factory=list)

    def add_call(self, seconds: float) -> None:
        """Notes the time of a device call."""
        if self.first_call_seconds is None:
            self.first_call_seconds = seconds
        else:
            self.later_call_seconds.append(seconds)


@dataclasses.dataclass(frozen=True)
class MeasuredRun:
    """Everything that a run's tables are made from; measured sums stay in their files until they are needed.

    Attributes:
      checkpoints: names and results, without arrays, that rows are made of, in step order.
      reference: the checkpoint that drift is measured to; None if there is none, or it cannot be used.
      weights: reads how a checkpoint's weights differ from others', see `WeightComparisons`.
      moved: reads how a checkpoint's states differ from others', see `compare_consecutive`; None if not asked for.
      logistic: each checkpoint's logistic probes, None for one without; empty if the sweep has no probes.
      margins: forms each checkpoint's fixed margins.
      sums: reads a checkpoint's measured sums.

    What reads raises `InputError` if the file was lost.
    """

    checkpoints: Sequence[NamedResult]
    reference: NamedResult | None
    weights: Callable[[NamedResult], Mapping[str, np.ndarray]]
    moved: Callable[[NamedResult], Mapping[str, np.ndarray]] | None
    logistic: Sequence[Mapping[str, np.ndarray] | None]
    margins: FixedMargins
    sums: Callable[[NamedResult], Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class SweepReport:
    """What a sweep of one run left behind. The tables stay in their files, for there may be many runs.

    Attributes:
      run: the run.
      rows: the rows of `checkpoint_metrics.jsonl`; none, and no tables, if no checkpoint could be used.
      log: which checkpoints were measured, reused and refused.
      notes: sentences a reader should know, such as why a field is empty.
      vouched: the recorded accuracy that a checkpoint was compared with; None if there was none.
    """

    run: RunDir
    rows: Sequence[dict[str, Any]]
    log: SweepLog
    notes: list[str]
    vouched: Vouched | None = None

    @functools.cached_property
    def dataset(self) -> xr.Dataset | None:
        """Every mean, labelled; None without rows."""
        return RunResults(self.run).metrics if self.rows else None

    @functools.cached_property
    def intervals(self) -> xr.Dataset | None:
        """Those of the means that have them, labelled likewise."""
        return RunResults(self.run).intervals if self.rows else None
