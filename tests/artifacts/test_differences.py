"""How far results are apart, by hand."""

import math

import numpy as np
import pytest

from kvjax.artifacts.differences import between_arrays, between_documents, largest

ROWS = [{"step": 100, "a": 2.0, "b": {"c": [1, 2.0, None]}}, {"step": 200, "a": -4.0, "b": {"c": []}}]


def test_equal_documents():
    """Equal documents are not apart."""
    assert between_documents(ROWS, [dict(row) for row in ROWS], where="rows").size == 0
    assert between_documents([], [], where="rows").size == 0


def test_largest_difference_of_documents():
    """The difference is relative to the larger number, and named by steps and fields."""
    other = [{"step": 100, "a": 2.1, "b": {"c": [1, 1.0, None]}}, {"step": 200, "a": -4.0, "b": {"c": []}}]
    found = between_documents(ROWS, other, where="rows")
    assert (found.size, found.where) == (0.5, "rows[step 100] b c[1]")


@pytest.mark.parametrize(("mine", "theirs"), [(1, None), (1, True), ("a", "b"), ([1], [1, 2]), ({"a": 1}, {"b": 1})])
def test_documents_of_unequal_forms(mine, theirs):
    """What is not of one form is infinitely far apart."""
    assert between_documents(mine, theirs, where="x").size == math.inf


def test_numbers_that_are_nearly_nothing():
    """With a floor, 1e-9 and 0 are nearly the same."""
    assert between_documents(1e-9, 0, where="x").size == 1
    assert math.isclose(between_documents(1e-9, 0, where="x", floor=1e-3).size, 1e-6)


@pytest.mark.parametrize(
    ("mine", "theirs", "size"),
    [
        ([1.0, np.nan, 10.0], [1.0, np.nan, 10.0], 0),
        ([1.0, 10.0], [2.0, 10.0], 0.1),
        ([0.0, 0.0], [0.0, 0.25], 0.25),
        ([1.0, np.nan], [1.0, 2.0], math.inf),
        ([np.inf], [-np.inf], math.inf),
        ([1, 2], [1, 4], 1.0),
        ([True, False], [True, True], 1.0),
        (["a", "b"], ["a", "c"], math.inf),
        ([1.0], [1.0, 1.0], math.inf),
    ],
)
def test_arrays(mine, theirs, size):
    """Relative to the largest number of the array; what exists in one only is infinitely far."""
    assert between_arrays({"x": np.array(mine)}, {"x": np.array(theirs)}, where="sums").size == size


def test_arrays_of_other_names():
    """An array that only one has is named."""
    x = np.zeros(1)
    found = between_arrays({"x": x}, {"x": x, "y": x}, where="sums")
    assert (found.size, found.where) == (math.inf, "sums y")
    assert largest([]).size == 0
