"""Ranks and rank correlations, by hand and against SciPy."""

import numpy as np
import pytest
import scipy.stats

from kvjax.measure.statistics import average_ranks, places, ranking, spearman


def test_ranking_largest_first():
    """Equal values keep the order of their indices."""
    assert ranking(np.array([0.1, 0.5, 0.5, 0.2])).tolist() == [1, 2, 3, 0]


def test_places_in_the_shape_of_the_values():
    """The largest of a grid is 1, and ties count along its rows."""
    assert places(np.array([[0.1, 0.5], [0.5, 0.2]])).tolist() == [[4, 1], [2, 3]]


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 7), (2, 3, 12)])
def test_average_ranks_of_many_ties(shape):
    """Ranks along the last axis equal SciPy's, also if most values are shared."""
    values = np.random.default_rng(0).integers(0, 4, shape).astype(float)
    np.testing.assert_array_equal(average_ranks(values), scipy.stats.rankdata(values, axis=-1))


def test_spearman_of_every_pair_of_rows():
    """Correlations along the last axis equal SciPy's, one pair at a time."""
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 6, (2, 4, 5, 9)).astype(float)
    ours = spearman(a, b)
    for index in np.ndindex(4, 5):
        np.testing.assert_allclose(ours[index], scipy.stats.spearmanr(a[index], b[index]).statistic, atol=1e-12)


def test_spearman_without_a_value():
    """A constant side and a missing number have no correlation."""
    rising = np.array([1.0, 2.0, 3.0])
    for other in ([2.0, 2.0, 2.0], [1.0, np.nan, 3.0]):
        assert np.isnan(spearman(rising, np.array(other))) and np.isnan(spearman(np.array(other), rising))
