"""Everything measured on a run so far: this sweep's checkpoints, earlier ones', and what compares or extends them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from kvjax.artifacts.checkpoint_sums import CheckpointResult, ResultStore
from kvjax.execution.inputs import BEST, PreparedRun, step_files
from kvjax.model.checkpoint import CheckpointSource
from kvjax.sweeps.compiled_sweep import ProbeProgram
from kvjax.sweeps.logistic_probes import measure_logistic
from kvjax.sweeps.settings import SweepSettings
from kvjax.sweeps.state_similarity import measure_movement


@dataclasses.dataclass(frozen=True)
class MeasuredRun:
    """What a run's tables are made from.

    Attributes:
      checkpoints: the results that rows are made of, in step order.
      reference: the checkpoint that drift is measured to; None where there is none, or it could not be used.
      moved: how each checkpoint's states differ from others', as `measure_movement` returns it; None where not asked.
      logistic: each checkpoint's logistic probes, None for those that have none; empty without probes.
    """

    checkpoints: Sequence[CheckpointResult]
    reference: CheckpointResult | None
    moved: Sequence[Mapping[str, np.ndarray]] | None
    logistic: Sequence[Mapping[str, np.ndarray] | None]


def gather_measured(
    work: PreparedRun,
    results: Mapping[str, CheckpointResult],
    program: ProbeProgram,
    store: ResultStore,
    source: CheckpointSource,
    settings: SweepSettings,
) -> MeasuredRun:
    """Returns everything measured on a run, measuring what only exists between checkpoints or at named steps.

    Args:
      work: the run.
      results: what this sweep measured or found measured, by name.
      program: what measured it.
      store: where results are kept, those of other steps too.
      source: where checkpoints come from.
      settings: the sweep's settings.

    Raises:
      InputError: a checkpoint whose states are needed again cannot be used.
    """
    results, of_steps = dict(results), step_files(work.run)
    for name, (_, path) in of_steps.items():
        # Steps measured earlier stay in the tables whatever `steps` this sweep was given.
        if name not in work.wanted and (earlier := store.load(name, path)) is not None:
            results[name] = earlier
    tabled = {name: result for name, result in sorted(results.items(), key=lambda item: item[1].step) if name != BEST}
    reference = results.get(work.reference) if work.reference else None
    files = of_steps | dict(work.wanted)
    moved = None
    if settings.event_drift and tabled:
        named = (work.reference, reference) if reference else None
        moved = measure_movement(list(tabled.items()), named, files, program, store, source)
    logistic: list[Mapping[str, np.ndarray] | None] = []
    if settings.probe != "none" and tabled:
        asked = settings.probe == "logistic"
        found = measure_logistic(tabled, lambda name: asked and name in work.named, files, program, store, source)
        logistic = [found.get(name) for name in tabled]
    return MeasuredRun(list(tabled.values()), reference, moved, logistic)
