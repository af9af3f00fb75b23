"""How a stage tells how far it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Advance = Callable[[int], None]  # called with how many more items are done
Progress = Callable[[int, str], AbstractContextManager[Advance]]  # from the number of items and their unit


def no_progress(total: int, unit: str) -> AbstractContextManager[Advance]:
    """Shows nothing."""
    return nullcontext(lambda done: None)
