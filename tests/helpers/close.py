"""The tolerance of comparisons with other implementations."""

from __future__ import annotations

import math


def close(ours: float | None, theirs: float | None, what: object = "") -> None:
    """Asserts that two numbers agree to 1e-4 relative + 1e-5, or that both are None."""
    if theirs is None or ours is None:
        assert ours is theirs, what
    else:
        assert math.isclose(ours, theirs, rel_tol=1e-4, abs_tol=1e-5), f"{what}: {ours} against {theirs}"
