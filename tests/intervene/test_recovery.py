"""Recoveries by hand: ratios of means over reads, and no ratio where the runs do not differ."""

import dataclasses

import numpy as np

from kvjax.intervene.recovery import PairGroups, means_per_read, recoveries
from kvjax.measure.uncertainty import resample_counts


def groups_of(reads, kinds=None):
    reads = np.array(reads)
    members = {"value": np.arange(len(reads))} if kinds is None else kinds
    codes = np.zeros(len(reads), int)
    for index, own in enumerate(members.values()):
        codes[own] = index
    return PairGroups(members, reads, resample_counts(codes, seed=1))


def test_two_pairs_by_hand():
    """Recoveries and means are ratios of sums over reads, not means over pairs."""
    groups = groups_of([1, 3])
    base, source = np.array([[-4.0, -2.0]]), np.array([[6.0, 4.0]])  # summed over reads; the gap is 16
    patched = np.array([[[-4.0, 6.0, 1.0], [-2.0, 4.0, 1.0]]])  # [checkpoints, pairs, places]
    found = recoveries(groups, patched, base, source)
    np.testing.assert_allclose(found[0, 0, 0], [0.0, 1.0, 0.5], atol=1e-6)
    means = means_per_read(groups, patched)
    np.testing.assert_allclose(means[0, 0, 0], [-1.5, 2.5, 0.5], atol=1e-6)


def test_single_pair():
    """One pair has an estimate, but nothing to resample: no interval."""
    patched, base, source = np.array([[[1.0]]]), np.array([[-4.0]]), np.array([[6.0]])
    groups = groups_of([2])
    for found, expected in ((means_per_read(groups, patched), 0.5), (recoveries(groups, patched, base, source), 0.5)):
        assert found[0, 0, 0, 0] == expected and np.isnan(found[1:]).all()


def test_recovery_in_both_directions():
    """Both directions give one number, and its interval encloses the truth."""
    rng = np.random.default_rng(0)
    base, source = rng.normal(-3, 1, (2, 80)), rng.normal(5, 1, (2, 80))
    patched = base + 0.3 * (source - base) + rng.normal(0, 0.2, (2, 80))
    there = recoveries(groups_of(np.ones(80)), patched[..., None], base, source)
    back = recoveries(groups_of(np.ones(80)), -patched[..., None], -base, -source)
    np.testing.assert_allclose(there, back, atol=1e-6)
    estimate, low, high = there[:, 0, :, 0]
    assert (low < 0.3).all() and (high > 0.3).all() and (high - low < 0.05).all()
    np.testing.assert_allclose(estimate, 0.3, atol=0.02)


def test_recovery_of_a_gap_that_may_be_zero():
    """There is no ratio if the interval of the runs' difference includes 0."""
    rng = np.random.default_rng(1)
    base = rng.normal(size=(2, 60))
    source = base + np.stack([rng.normal(0, 1, 60), rng.normal(5, 1, 60)])
    found = recoveries(groups_of(np.ones(60)), (0.5 * (base + source))[..., None], base, source)
    assert np.isnan(found[:, 0, 0]).all(), "runs of the first checkpoint do not differ"
    np.testing.assert_allclose(found[0, 0, 1], 0.5, atol=1e-6)


def test_recovery_by_kind(encoded):
    """Each kind of pair has its own estimate and its own resamples."""
    groups = PairGroups.of(encoded)
    assert groups.kinds == ["value", "query", "swap", "stale"]
    ones = np.ones((1, len(encoded)))
    only = np.where(encoded.kinds == 1, 4.0, 0.0)[None] * groups.reads_N
    found = recoveries(groups, only[..., None], 0 * ones, 8.0 * groups.reads_N[None] * ones)
    np.testing.assert_allclose(found[0, :, 0, 0], [0.0, 0.5, 0.0, 0.0])
    drawn = dataclasses.replace(groups).counts_KxN[:, encoded.kinds == 1].sum(axis=1)
    assert (drawn == (encoded.kinds == 1).sum()).all()
