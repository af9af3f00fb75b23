"""Finding measured sums again, and telling a damaged file without reading its arrays."""

from __future__ import annotations

import numpy as np
import pytest

from kvjax.artifacts.checkpoint_sums import ResultStore

NAME, KEY = "step_000250", "hash of the checkpoint"
ARRAYS = {"counts": np.arange(600, dtype=np.float32).reshape(20, 30), "flags": np.ones(7, bool)}


@pytest.fixture
def store(tmp_path):
    store = ResultStore(tmp_path, {"precision": "highest"})
    store.save(NAME, KEY, 250, ARRAYS, {"seconds": 1.5})
    return store


@pytest.fixture
def file(store):
    return store.folder / f"{NAME}.npz"


def test_sums_are_found_again(store):
    """Arrays and provenance come back as they were stored."""
    found = store.find(NAME, KEY)
    assert found.step == 250 and found.info["seconds"] == 1.5
    assert found.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found.arrays[name], array)
    assert store.holds(NAME, KEY)


def test_numpy_reads_the_file_too(store, file):
    """The file is a plain `.npz`."""
    with np.load(file) as stored:
        np.testing.assert_array_equal(stored["counts"], ARRAYS["counts"])


@pytest.mark.parametrize("look", ["find", "holds"])
class TestMissing:
    def test_of_another_checkpoint(self, store, look):
        """Sums of a file with another hash count as missing."""
        assert not getattr(store, look)(NAME, "another hash")

    def test_of_other_settings(self, store, look):
        """Sums measured with other settings count as missing."""
        assert not getattr(ResultStore(store.folder, {"precision": "default"}), look)(NAME, KEY)

    def test_no_file(self, store, look):
        """A file that is not there is no error."""
        assert not getattr(store, look)("step_000500", KEY)

    def test_cut_off_anywhere(self, store, file, look):
        """A file that ends too early counts as missing, wherever it ends."""
        whole = file.read_bytes()
        for length in range(0, len(whole), 13):
            file.write_bytes(whole[:length])
            assert not getattr(store, look)(NAME, KEY), length

    def test_bytes_missing_in_the_middle(self, store, file, look):
        """A file whose end is there, but too near, counts as missing."""
        whole = file.read_bytes()
        middle = len(whole) // 2
        file.write_bytes(whole[:middle] + whole[middle + 8 :])
        assert not getattr(store, look)(NAME, KEY)

    def test_provenance_with_any_bit_changed(self, store, file, look):
        """A changed character may leave valid JSON of another checkpoint's step."""
        whole = file.read_bytes()
        text = "seconds".encode("utf-32-le")
        begin = whole.index(text)
        for place in range(begin, begin + len(text), 3):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            file.write_bytes(damaged)
            assert not getattr(store, look)(NAME, KEY), place
