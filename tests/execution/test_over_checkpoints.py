"""The one loop over checkpoints: chunks of one size, results of the real ones alone, nothing lost after an error."""

import jax
import numpy as np
import pytest

from kvjax.errors import InputError
from kvjax.execution.over_checkpoints import checkpoints_of, over_chunks, stack_trees


def refused_after(items):
    """Yields items, then fails as an unusable checkpoint does."""
    yield from items
    raise InputError("step_000009.pt: damaged")


class Doubling:
    """Doubles the items of a chunk, as a compiled function would, and notes what it was given."""

    def __init__(self):
        self.chunks = []

    def __call__(self, items):
        self.chunks.append(items)
        return {"doubled": jax.numpy.array(items) * 2}


@pytest.mark.parametrize("number", [1, 3, 6, 7])
@pytest.mark.parametrize("in_flight", [0, 1, 3])
def test_outputs_of_any_number_of_checkpoints(number, in_flight):
    """Every chunk has one size, and padding leaves no trace in what is yielded."""
    dispatch = Doubling()
    found = list(over_chunks(dispatch, iter(range(number)), size=3, in_flight=in_flight))
    assert {len(chunk) for chunk in dispatch.chunks} == {3}
    assert [item for chunk in found for item in chunk.items] == list(range(number))
    doubled = np.concatenate([chunk.outputs["doubled"] for chunk in found])
    np.testing.assert_array_equal(doubled, 2 * np.arange(number))


def test_chunks_in_flight():
    """The first chunk is handed on at once; a later one only after the next has been dispatched."""
    dispatch = Doubling()
    chunks = over_chunks(dispatch, range(8), size=2, in_flight=1)
    next(chunks)
    assert dispatch.chunks == [[0, 1]]
    next(chunks)
    assert dispatch.chunks == [[0, 1], [2, 3], [4, 5]]


def test_items_before_an_unusable_one():
    """They are measured and yielded before the error is raised."""
    chunks, kept = over_chunks(Doubling(), refused_after(range(3)), size=2), []
    with pytest.raises(InputError, match="damaged"):
        for chunk in chunks:
            kept += chunk.items
    assert kept == [0, 1, 2]


def test_chunks_in_flight_after_a_failure_of_the_caller():
    """Once no more items come, what the devices have begun can still be taken."""
    items = (item for item in range(9))
    chunks = over_chunks(Doubling(), items, size=2)
    found = [next(chunks).items, next(chunks).items]
    items.close()
    assert [*found, *(chunk.items for chunk in chunks)] == [[0, 1], [2, 3], [4, 5]]


def test_stacked_trees():
    """Any tree of arrays [C, …] is its checkpoints' trees, stacked."""
    stacked = {"a": np.arange(6).reshape(3, 2), "b": [np.arange(3.0)]}
    trees = list(checkpoints_of(stacked))
    assert len(trees) == 3
    jax.tree.map(np.testing.assert_array_equal, stack_trees(trees), stacked)
