"""Carrier shares: who carries the behaviour, and when nobody does."""

import numpy as np
import pytest
import xarray as xr

from kvjax.measure.uncertainty import resample_counts
from kvjax.model.components import all_heads
from kvjax.story.shares import carrier_shares, measured_drops

HEADS = all_heads(2, 2)


def shares_of(drops_CxX, *, floor=0.05, noise=0.001, above_chance=True):
    """Forms shares of drops whose resamples scatter by `noise`."""
    drops = np.array(drops_CxX, float)
    scatter = np.random.default_rng(0).normal(0.0, noise, (200, *drops.shape))
    above = np.full(len(drops), above_chance) if isinstance(above_chance, bool) else np.array(above_chance)
    return carrier_shares(HEADS, drops, drops + scatter, floor=floor, above_chance_C=above)


def test_shares_of_positive_drops():
    """A share is the drop over the sum of the positive drops: negative ones take nothing from the others."""
    shares = shares_of([[0.3, 0.1, -0.2, 0.0], [0.3, 0.3, 0.3, 0.1]])
    np.testing.assert_allclose(shares.shares_CxX, [[0.75, 0.25, -0.5, 0.0], [0.3, 0.3, 0.3, 0.1]], atol=1e-12)
    assert shares.carriers(0) == [0]
    assert shares.carriers(1) == [0, 1, 2], "the leader and all with half its share or more"


def test_shares_in_each_resample():
    """Every resample divides by its own sum, so that an interval covers the sum's noise too."""
    drops = np.array([[0.3, 0.1, 0.0, 0.0]])
    samples = np.array([[[0.2, 0.2, 0.0, 0.0]], [[0.4, 0.0, 0.0, 0.0]]])
    shares = carrier_shares(HEADS, drops, samples, floor=0.01, above_chance_C=np.array([True]))
    np.testing.assert_allclose(shares.samples_JxCxX[:, 0, 0], [0.5, 1.0])


@pytest.mark.parametrize(
    "case",
    [
        {"drops_CxX": [[0.04, 0.02, 0.0, 0.0]]},
        {"drops_CxX": [[0.3, 0.1, 0.0, 0.0]], "noise": 0.2},
        {"drops_CxX": [[0.3, 0.1, 0.0, 0.0]], "above_chance": False},
        {"drops_CxX": [[-0.1, 0.0, -0.2, 0.0]]},
    ],
    ids=["below the floor", "within noise", "at chance", "no positive drop"],
)
def test_checkpoints_without_carriers(case):
    """Nobody carries: shares would be those of noise, and there are none."""
    shares = shares_of(**case)
    assert not shares.carried_C[0] and np.isnan(shares.shares_CxX).all() and shares.carriers(0) == []


def test_drops_from_sums_of_sequences():
    """A drop is the difference of right answers over all reads, as counted by hand."""
    right = np.array([[[1, 1], [1, 0]]], np.float32)  # one step, two sequences of two reads: 3 of 4 right
    ablated = np.zeros((1, 2, 1, 2), np.float32)
    ablated[0, :, 0, 0] = [0, 1]  # 1 of 4 right
    ablated[0, :, 0, 1] = [2, 1]  # 3 of 4
    events = xr.Dataset(
        {
            "is_read": (("sequence", "read"), np.ones((2, 2), bool)),
            "split": (("sequence",), ["a", "a"]),
            "read_correct": (("step", "sequence", "read"), right),
            "head_resample_correct": (("step", "sequence", "layer", "head"), ablated),
        }
    )
    counts = resample_counts(np.zeros(2, int), resamples=20)
    components, drops, samples = measured_drops(events, "head", "resample", counts)
    assert [str(one) for one in components] == ["L0H0", "L0H1"]
    np.testing.assert_allclose(drops, [[0.5, 0.0]])
    assert samples.shape == (20, 1, 2) and set(np.unique(samples[:, 0, 0])) <= {0.0, 0.5, 1.0}
