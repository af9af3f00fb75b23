"""A unit of work that times itself, as workers find it by name."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from typing import Any


def timed(stage: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Calls a stage and returns its core seconds, seconds, and the bytes of the report that a command would get."""
    start, cores = time.perf_counter(), _core_seconds()
    report = stage(*arguments)
    spent = {"core_s": round(_core_seconds() - cores, 2), "s": round(time.perf_counter() - start, 2)}
    return spent | {"report_kb": round(len(pickle.dumps(report)) / 1e3, 1)}


def core_seconds_so_far() -> float:
    """Measures the core seconds of this process since it began, those of Python, imports and connecting included."""
    return round(_core_seconds(), 2)


def _core_seconds() -> float:
    return sum(os.times()[:2])
