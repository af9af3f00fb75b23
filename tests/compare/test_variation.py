"""Spread over seeds, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from kvjax.compare.variation import seed_spread


def test_spread_by_hand():
    """Median, range and deviation leave out a seed without a value; the sampling share is a ratio of variances."""
    found = seed_spread([0.9, None, 0.7, 0.8], [0.01, None, 0.01, 0.02])
    assert (found.median, found.low, found.high) == (0.8, 0.7, 0.9)
    assert found.deviation == pytest.approx(0.1)
    assert found.sampling_share == pytest.approx(np.mean([1e-4, 1e-4, 4e-4]) / 0.01)


def test_spread_of_one_seed_and_of_none():
    """A single seed has no deviation, and none have no spread."""
    assert seed_spread([0.5]).deviation is None
    assert seed_spread([None, float("nan")]) is None
