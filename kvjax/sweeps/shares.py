"""Cuts a run's checkpoints into shares that several processes measure, and joins what they report.

A share is a stretch of consecutive checkpoints, so that few are compared with checkpoints of other shares. Measured
sums lie in files of their own, whoever wrote them; only hashes and what happened are reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

from kvjax.artifacts.checkpoint_sums import ResultStore
from kvjax.execution.inputs import BEST, RunInputs
from kvjax.sweeps.results import SweepLog

_FOUND_MEASURED = 0.01  # of the time that measuring takes: the file is only hashed


@dataclasses.dataclass(frozen=True)
class ShareReport:
    """What one process made of its share of a run's checkpoints.

    Attributes:
      log: what happened.
      sha256: name -> hash of the file, of each checkpoint that is measured now.
    """

    log: SweepLog
    sha256: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """Writes it as a JSON document."""
        return {"log": dataclasses.asdict(self.log), "sha256": dict(self.sha256)}

    @classmethod
    def of_json(cls, document: Mapping[str, Any]) -> Self:
        """Reads a document that `as_json` wrote."""
        return cls(SweepLog(**document["log"]), document["sha256"])


def cut_into_shares(inputs: RunInputs, store: ResultStore, number: int, *, anew: bool) -> list[tuple[str, ...]]:
    """Cuts the wanted checkpoints of a run into at most so many shares, about equal in what is left to measure.

    No checkpoint is opened: what has a file of sums counts as measured.

    Args:
      inputs: the run.
      store: its measured sums.
      number: of shares.
      anew: whether everything is measured again.

    Returns:
      The names of each share, in the order of steps; none is empty.
    """
    names = sorted(inputs.wanted, key=lambda name: (name == BEST, inputs.wanted[name][0] or 0))
    measured = set() if anew else {name for name in names if store.has_file(name)}
    return [share for share in _equal_parts(names, measured, number) if share]


def _equal_parts(names: Sequence[str], measured: Collection[str], number: int) -> list[tuple[str, ...]]:
    work = [_FOUND_MEASURED if name in measured else 1.0 for name in names]
    whole, before, shares = sum(work), 0.0, [[] for _ in range(number)]
    for name, own in zip(names, work, strict=True):
        middle = before + own / 2
        shares[min(number - 1, int(number * middle / whole))].append(name)
        before += own
    return [tuple(share) for share in shares]


def joined_log(reports: Sequence[ShareReport]) -> SweepLog:
    """Joins what happened to the shares of a run into the log that one process would have kept."""
    logs = [report.log for report in reports]
    reasons = [log.unvouched for log in logs if log.measured]
    first_calls = [log.first_call_seconds for log in logs if log.first_call_seconds is not None]
    return SweepLog(
        measured=sorted(step for log in logs for step in log.measured),
        reused=sorted(step for log in logs for step in log.reused),
        refused={file: why for log in logs for file, why in log.refused.items()},
        unvouched=None if None in reasons else next(iter(reasons), None),
        not_kept=next((log.not_kept for log in logs if log.not_kept), None),
        first_call_seconds=max(first_calls, default=None),
        later_call_seconds=[seconds for log in logs for seconds in log.later_call_seconds],
    )
