"""When two kinds of ablation disagree about a component: disjoint intervals and a factor of two, or opposite signs."""

import numpy as np
import pytest
import xarray as xr

from kvjax.report.leaders import leaders_cell, leaders_heading, leaders_notes
from kvjax.sweeps.rows import disagreement, head_rows

SURE = 0.01  # half an interval's width


@pytest.mark.parametrize(
    ("a", "b", "half_width", "expected"),
    [
        (0.5, 0.01, SURE, True),
        (0.5, 0.25, SURE, True),  # exactly a factor of two
        (0.5, 0.26, SURE, False),
        (0.5, 0.01, 0.3, False),  # intervals that overlap
        (0.5, 0.25, 0.125, False),  # intervals that touch
        (0.1, -0.1, SURE, True),  # it helps, or it hurts
        (-0.3, -0.1, SURE, True),
        (-0.15, -0.1, SURE, False),
        (0.05, 0.0, SURE, True),
        (0.0, 0.0, SURE, False),
        (0.5, 0.01, np.nan, False),  # no interval, no claim
        (np.nan, 0.01, SURE, False),
    ],
)
def test_two_kinds(a, b, half_width, expected):
    """Two effects disagree whichever comes first."""
    ends = [np.array([x, x - half_width, x + half_width]) for x in (a, b)]
    assert bool(disagreement(*ends[0], *ends[1])) is expected
    assert bool(disagreement(*ends[1], *ends[0])) is expected


KINDS = ("zero", "role_mean", "resample", "random")
# One head each: an artefact of zero ablation, one that all kinds agree on, and one that the control alone calls 0.
DROPS = np.array([[0.5, 0.01, 0.02, 0.4], [0.42, 0.4, 0.41, 0.0], [0.2, 0.2, 0.2, 0.0]])


@pytest.fixture
def means():
    dims = ("step", "ablation", "split", "layer", "head")
    drops = (dims, DROPS.T[None, :, None, None])
    spread = (("step", "split", "layer", "head"), np.full((1, 1, 1, 3), 0.125))
    coords = {"step": [100], "ablation": list(KINDS), "split": ["all"], "layer": [0], "head": [0, 1, 2]}
    measures = {"head_accuracy_drop": drops, "head_accuracy_drop_random_spread": spread}
    return xr.Dataset(measures, coords, {"ranked_by": "role_mean"})


@pytest.fixture
def intervals(means):
    drops = means["head_accuracy_drop"]
    return xr.Dataset(
        {"head_accuracy_drop": xr.concat([drops, drops - SURE, drops + SURE], "statistic")}
    ).assign_coords(statistic=["estimate", "low", "high"])


def test_marks_of_heads(means, intervals):
    """Any two of zero, role mean and resample may disagree; the random control replaces nothing and is left out."""
    assert [row["ablations_disagree"] for row in head_rows(means, intervals)] == [True, False, False]
    assert [row["rank"] for row in head_rows(means, intervals)] == [3, 1, 2]


def test_one_kind(means, intervals):
    """With zero ablation and the control alone there is nothing to disagree."""
    few = {"ablation": ["zero", "random"]}
    rows = head_rows(means.sel(few).assign_attrs(ranked_by="zero"), intervals.sel(few))
    assert [row["ablations_disagree"] for row in rows] == [None, None, None]


def test_printed_leaders(means, intervals):
    """The printed leaders stand in ranking order with every kind's drop, marked if two disagree, and say why."""
    heads = sorted(head_rows(means, intervals), key=lambda row: row["rank"])
    row = {"step": 100, "ranked_by": "role_mean", "top_heads": heads}
    assert leaders_heading(row) == "heads by role-mean accuracy drop: zero | role-mean | resample"
    assert leaders_cell(row) == (
        "L0H1 0.420 | 0.400 | 0.410   L0H2 0.200 | 0.200 | 0.200   L0H0 0.500 | 0.010 | 0.020*"
    )
    marks, control = leaders_notes([row])
    assert marks.startswith("* two kinds of ablation disagree: ")
    assert "a random step the size of the head's write, with nothing replaced" in control
    assert control.endswith("L0H1 0.000 (0.125), L0H2 0.000 (0.125), L0H0 0.400 (0.125)")
