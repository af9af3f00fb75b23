"""Changes, rank correlations and turnover, by hand."""

import numpy as np
import scipy.stats

from kvjax.measure.between_checkpoints import (
    change_from_previous,
    rank_correlation_to_previous,
    turnover_from_previous,
)


def test_change_of_the_first_checkpoint():
    """The first checkpoint has no change; later ones subtract their predecessor."""
    changes = change_from_previous(np.array([1.0, 4.0, 2.0]))
    assert np.isnan(changes[0]) and changes[1:].tolist() == [3.0, -2.0]


def test_rank_correlation_by_hand():
    """Rank correlation of tied values equals the hand-computed one and SciPy's."""
    values = np.array([[0.0, 1.0, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0]])
    correlation = rank_correlation_to_previous(values)
    assert np.isnan(correlation[0])
    assert np.isclose(correlation[1], 4.5 / np.sqrt(4.5 * 5))
    assert np.isclose(correlation[1], scipy.stats.spearmanr(*values).statistic)


def test_rank_correlation_of_a_constant_side():
    """A checkpoint whose components are all equal has no order, so neither neighbour has a correlation."""
    values = np.array([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    correlation = rank_correlation_to_previous(values)
    assert np.isnan(correlation[[0, 1, 3]]).all() and np.isclose(correlation[2], -1.0)


def test_turnover_by_hand():
    """Turnover is one less the overlap of both top sets."""
    values = np.array([[3.0, 2.0, 1.0, 0.0], [3.0, 0.0, 1.0, 2.0], [0.0, 3.0, 2.0, 1.0]])
    turnover = turnover_from_previous(values, 2)
    assert np.isnan(turnover[0])
    assert np.isclose(turnover[1], 1 - 1 / 3)
    assert np.isclose(turnover[2], 1.0)
