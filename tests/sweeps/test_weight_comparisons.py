"""Which checkpoints' weights are compared, in whatever order they arrive, and how long parameters are held."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import numpy as np
import pytest

from kvjax.artifacts.checkpoint_sums import CheckpointResult, ResultStore
from kvjax.errors import InputError
from kvjax.measure.weight_spectra import head_spectra
from kvjax.model.weights import tensor_groups
from kvjax.sweeps.weight_comparisons import WeightComparisons, compared_with
from tests.helpers.weights import zeros

NAMES = tuple(f"step_{step:06d}" for step in range(8))
FINAL_NORM = tensor_groups(2).index("final_norm")


@dataclasses.dataclass
class Shape:
    n_layers: int = 2
    n_heads: int = 1


@dataclasses.dataclass(eq=False)
class Arrived:
    """A checkpoint whose final LayerNorm's gain says its step."""

    step: int
    params: Any
    sha256: str
    config: Shape = dataclasses.field(default_factory=Shape)


def checkpoint(name):
    """Makes the checkpoint of a name, at a position on a line that its step gives."""
    step, params = int(name[-6:]), zeros()
    params["final_norm"]["scale"][0] = step**2
    return Arrived(step, params, f"hash of {name}")


def tabled(names):
    return [(name, CheckpointResult(int(name[-6:]), {}, {"sha256": f"hash of {name}"})) for name in names]


class Source:
    """Loads checkpoints by the names of their files, and notes which."""

    def __init__(self):
        self.loaded = []

    def load(self, path, step):
        self.loaded.append(path)
        return checkpoint(path)


@pytest.fixture
def store(tmp_path):
    return ResultStore(tmp_path, {})


def compare(store, names, reference, **arriving):
    """Lets some checkpoints arrive, then compares all; returns squared distances of the gain, and what was loaded."""
    comparisons, source = WeightComparisons(store), Source()
    order = arriving.get("order", ())
    comparisons.plan(compared_with(names, reference), order)
    for name in order:
        own = checkpoint(name)
        comparisons.arrive(name, own, head_spectra(own.params, 1))
    named = dict(tabled(NAMES))
    found = comparisons.compare(
        tabled(names),
        reference and (reference, named[reference]),
        files={name: (None, name) for name in NAMES},
        source=source,
    )
    kinds = ("previous", "before_previous", "first")
    read = [found(named) for named in tabled(names)]
    distances = [[x.get(f"distance/{kind}", [np.nan] * 20)[FINAL_NORM] for kind in kinds] for x in read]
    return np.array(distances), source.loaded


def expected(names):
    """Works out the squared distances on the line."""
    at = [int(name[-6:]) ** 2 for name in names]

    def to(c, other):
        return np.nan if other < 0 else float(at[c] - at[other]) ** 2

    return [[to(c, c - 1), to(c, c - 2), to(c, 0)] for c in range(len(names))]


@pytest.mark.parametrize("reference", [None, NAMES[-1], NAMES[3]])
@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_arriving_weights(store, reference, backwards):
    """All are compared as they arrive, in either order, and nothing is loaded again, then or later."""
    order = NAMES[::-1] if backwards else NAMES
    found, loaded = compare(store, NAMES, reference, order=order)
    np.testing.assert_array_equal(found, expected(NAMES))
    assert loaded == []
    again, loaded = compare(store, NAMES, reference)
    np.testing.assert_array_equal(again, found)
    assert loaded == []


def test_weights_of_a_growing_run(store):
    """A new checkpoint loads the two before it, the first and the reference again, and no other."""
    compare(store, NAMES[:6], NAMES[0], order=NAMES[:6])
    found, loaded = compare(store, NAMES[:7], NAMES[0])
    np.testing.assert_array_equal(found, expected(NAMES[:7]))
    assert sorted(loaded) == [NAMES[0], NAMES[4], NAMES[5], NAMES[6]]


def test_weights_after_a_step_between(store):
    """A checkpoint that comes between others changes their predecessors."""
    sparse = NAMES[::2]
    compare(store, sparse, None, order=sparse)
    found, _ = compare(store, NAMES, None)
    np.testing.assert_array_equal(found, expected(NAMES))


def test_weights_without_a_refused_checkpoint(store):
    """Comparisons with a checkpoint that cannot be used are dropped; the others take its neighbours."""
    comparisons, usable = WeightComparisons(store), [name for name in NAMES if name != NAMES[2]]
    comparisons.plan(compared_with(NAMES, None), NAMES)
    for name in NAMES:
        if name == NAMES[2]:
            comparisons.give_up(name)
        else:
            own = checkpoint(name)
            comparisons.arrive(name, own, head_spectra(own.params, 1))
    found, loaded = compare(store, usable, None)
    np.testing.assert_array_equal(found, expected(usable))
    assert set(loaded) == {NAMES[0], NAMES[1], NAMES[3], NAMES[4]}, "those beside it and the first"


def test_lost_comparison(store, tmp_path):
    """One that is damaged before the tables are drawn is refused by the checkpoint's name, and then made again."""
    found, _ = compare(store, NAMES, None, order=NAMES)
    comparisons = WeightComparisons(store)
    files = {name: (None, name) for name in NAMES}
    of_checkpoint = comparisons.compare(tabled(NAMES), None, files=files, source=Source())
    (tmp_path / f"weights_{NAMES[3]}.npz").write_bytes(b"")
    assert of_checkpoint(tabled(NAMES)[2])
    with pytest.raises(InputError, match=f"{NAMES[3]}: .*weights_{NAMES[3]}.npz was lost"):
        of_checkpoint(tabled(NAMES)[3])
    again, loaded = compare(store, NAMES, None)
    np.testing.assert_array_equal(again, found)
    assert sorted(loaded) == [NAMES[0], *NAMES[1:4]]


def test_held_parameters(store):
    """At most five checkpoints' parameters are held: two before, the first, the reference and the one that arrives."""
    comparisons, alive, most = WeightComparisons(store), weakref.WeakSet(), 0
    order = (NAMES[-1], *NAMES[:-1])
    comparisons.plan(compared_with(NAMES, NAMES[-1]), order)
    for name in order:
        own = checkpoint(name)
        alive.add(own)
        comparisons.arrive(name, own, head_spectra(own.params, 1))
        del own
        most = max(most, len(alive))
    assert most <= 5 and not alive


def test_checkpoint_that_changed_during_a_sweep(store):
    """A file that is another one when it is read again is refused by name."""

    class Changed(Source):
        def load(self, path, step):
            return dataclasses.replace(checkpoint(path), sha256="another")

    with pytest.raises(InputError, match="step_000000: expected a file that stays as it is"):
        WeightComparisons(store).compare(tabled(NAMES[:1]), None, files={NAMES[0]: (None, NAMES[0])}, source=Changed())
