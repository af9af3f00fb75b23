"""What a run has logged up to the step that training goes on from, checked before anything of it is changed."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path

from kvjax.artifacts.training_log import LoggedRow, TrainingLog
from kvjax.config.train import CheckpointingConfig
from kvjax.errors import unusable
from kvjax.train.loop import Row

_LARGEST = sys.float_info.max


@dataclasses.dataclass(frozen=True)
class RunHistory:
    """A run up to a step.

    Attributes:
      step: the last step of it that counts.
      lines: lines of `metrics.jsonl` up to the step, as they were written.
      evaluations: the last row of each split.
      best: the best row of the split that decides on the best checkpoint; None if there is none.
    """

    step: int
    lines: tuple[bytes, ...] = ()
    evaluations: Mapping[str, Row] = dataclasses.field(default_factory=dict)
    best: Row | None = None

    @classmethod
    def of(cls, log: TrainingLog, step: int, checkpointing: CheckpointingConfig) -> RunHistory:
        """Takes from a log what was logged up to a step.

        Raises:
          InputError: a row has no phase or step, or an evaluation lacks what the best checkpoint is chosen by.
        """
        log.note_torn_line()
        lines, evaluations, best = [], {}, None
        for row in log.rows:
            where = f"{log.path}:{row.number}"
            if row.step is None or not isinstance(row.phase, str):
                raise unusable(where, "a row with a phase, and a step that is a whole number", row.line.decode())
            if row.step > step:
                continue
            lines.append(row.line)
            if row.phase == "eval":
                evaluation = _evaluation(row, checkpointing, where)
                evaluations[evaluation["split"]] = evaluation
                if evaluation["split"] == checkpointing.best_checkpoint_split:
                    best = evaluation if is_better(evaluation, best, checkpointing) else best
        return cls(step, tuple(lines), evaluations, best)


def is_better(candidate: Row, best: Row | None, checkpointing: CheckpointingConfig) -> bool:
    """Says whether a later evaluation beats the best so far; ties go to the lower loss, then to the earlier step.

    An evaluation without a finite metric and loss is never the best.
    """
    metric = checkpointing.best_checkpoint_metric
    if not (math.isfinite(candidate[metric]) and math.isfinite(candidate["loss"])):
        return False
    if best is None:
        return True
    sign = 1.0 if checkpointing.best_checkpoint_maximize else -1.0
    ahead, behind = sign * candidate[metric], sign * best[metric]
    return ahead > behind or (ahead == behind and candidate["loss"] < best["loss"])


def _evaluation(row: LoggedRow, checkpointing: CheckpointingConfig, where: str | Path) -> Row:
    if not isinstance(row.values.get("split"), str):
        raise unusable(where, "an evaluation of a split", repr(row.values.get("split")))
    evaluation = {**row.values, "step": row.step}
    if evaluation["split"] == checkpointing.best_checkpoint_split:
        for name in ("loss", checkpointing.best_checkpoint_metric):
            value = evaluation.get(name)
            whole = isinstance(value, int) and abs(value) > _LARGEST  # which is no float
            if whole or isinstance(value, bool) or not isinstance(value, int | float):
                raise unusable(where, f"an evaluation with a number as {name}", repr(value))
    return evaluation
