"""Curricula: which records each stage draws, and that steps without one draw as before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvjax.config.train import CurriculumStage
from kvjax.errors import InputError
from kvjax.train.curriculum import draw_batches, draw_phases
from kvjax.train.trainer import batch_indices

SOURCE = Path("train.jsonl")


def record(active_keys, lags):
    """Returns the parts of a record that curricula look at."""
    axes = {"active_keys": active_keys, "overwrite_count": 6, "num_queries": len(lags)}
    return {"axes": axes, "query_plan": [{"writes_since_support": lag} for lag in lags]}


RECORDS = [record(2, [1, 1]), record(3, [1, 2]), record(2, [2]), record(3, [1]), record(2, [1, 2, 2])]


def stage(until, **limits):
    ranges = {axis: {"min": low, "max": high} for axis, (low, high) in limits.items()}
    return CurriculumStage.model_validate({"until_step": until, **ranges})


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"active_keys": (2, 2)}, [0, 2, 4]),
        ({"query_lag": (1, 1)}, [0, 3]),
        ({"query_lag": (2, 3)}, [2]),
        ({"num_queries": (1, 2), "active_keys": (3, 3)}, [1, 3]),
    ],
)
def test_records_of_a_stage(limits, expected):
    """A stage draws the records that lie within all its ranges, every read's lag included."""
    phases = draw_phases([stage(10, **limits)], RECORDS, SOURCE)
    assert phases[0].records.tolist() == expected
    assert (phases[1].after, phases[1].until, phases[1].records.tolist()) == (10, None, [0, 1, 2, 3, 4])


def test_batches_of_two_stages():
    """Before its end a stage draws its own records alone, each once per epoch; then all are drawn."""
    phases = draw_phases([stage(3, active_keys=(2, 2))], RECORDS, SOURCE)
    rows = draw_batches(7, 1, 6, phases, batch_size=3)
    assert [sorted(row) for row in rows[:3].tolist()] == [[0, 2, 4]] * 3
    # Five records in batches of three: two batches make an epoch, the second padded by one.
    assert sorted(rows[3:5].reshape(-1).tolist()) == [-1, 0, 1, 2, 3, 4]


def test_batches_after_a_restart():
    """Batches depend on seed and step alone, wherever drawing begins, also in the middle of a stage."""
    phases = draw_phases([stage(4, active_keys=(2, 2)), stage(9, query_lag=(1, 2))], RECORDS, SOURCE)
    whole = draw_batches(7, 1, 14, phases, batch_size=2)
    for first in (3, 5, 8, 12):
        np.testing.assert_array_equal(draw_batches(7, first, 14 - first + 1, phases, batch_size=2), whole[first - 1 :])


def test_no_curriculum():
    """Without stages every step draws what it drew before there were any."""
    phases = draw_phases([], RECORDS, SOURCE)
    drawn = draw_batches(3, 4, 9, phases, batch_size=2)
    np.testing.assert_array_equal(drawn, batch_indices(3, 4, 9, num_records=5, batch_size=2))


def test_empty_stage():
    """A stage that no record fits is refused with what was asked for and what there is."""
    with pytest.raises(
        InputError, match=r"until step 10 \(active_keys 5 to 6\); found none among 5 \(active_keys 2 to 3"
    ):
        draw_phases([stage(10, active_keys=(5, 6))], RECORDS, SOURCE)


@pytest.mark.parametrize("ends", [(10, 10), (10, 5)])
def test_order_of_stages(ends):
    """Stages follow each other."""
    from tests.helpers.training import small_train_config

    with pytest.raises(ValueError, match="ascending until_step"):
        small_train_config("nowhere", curriculum=[stage(end, active_keys=(2, 2)) for end in ends])
