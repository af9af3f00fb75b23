"""Intervals of the sweep against a bootstrap written as loops, over what PyTorch measured."""

import numpy as np
import pytest
import xarray as xr

from kvjax.measure.uncertainty import resample_counts
from kvjax.sweeps.intervals import INTERVAL_SEED
from tests.helpers.building import STEPS
from tests.helpers.scores import score_interval


@pytest.fixture(scope="module")
def intervals(swept):
    path = swept / "analysis" / "checkpoint_metrics.nc"
    return xr.open_dataset(path, group="intervals", engine="netcdf4").load()


@pytest.fixture(scope="module")
def means(swept):
    return xr.open_dataset(swept / "analysis" / "checkpoint_metrics.nc", engine="netcdf4").load()


# Name in the file -> (where in it, what it is of one read).
MEASURES = {
    "answer_accuracy": ({}, lambda read: float(read["correct"])),
    "answer_margin": ({}, lambda read: read["margin"]),
    "recency_selectivity": ({}, lambda read: read["recency_selectivity"]),
    "head_stale_attention": ({"layer": 1, "head": 2}, lambda read: read["attention"][1, 2]["stale_attention"]),
    "head_margin_drop": (
        {"layer": 0, "head": 3, "ablation": "zero"},
        lambda read: read["margin"] - read["ablated"][0, 3]["margin"],
    ),
    "mlp_accuracy_drop": (
        {"layer": 1, "ablation": "zero"},
        lambda read: float(read["correct"]) - float(read["ablated"][1,]["correct"]),
    ),
    "lens_answer_accuracy": ({"stage": "layer_1_post_mlp"}, lambda read: read["lens_answer"]["layer_1_post_mlp"]),
}


def by_sequence(reads, of, split):
    """Returns, for each sequence of a split in order, the values of its reads that exist."""
    grouped = {}
    for read in reads:
        if read["split"] == split:
            values = grouped.setdefault(read["sample_id"], [])
            if (value := of(read)) is not None:
                values.append(float(value))
    return list(grouped.values())


def ends(mean, samples, name, sequences):
    """Returns the ends of an interval: of a rate, no narrower than of independent trials that vary as much.

    Trials are no more than sequences where a resample has one outcome alone.
    """
    low, high = np.percentile(samples, [2.5, 97.5])
    if name.endswith("accuracy") and 0 < mean < 1:
        trials = mean * (1 - mean) / np.var(samples)
        if min(samples) == 0 or max(samples) == 1:
            trials = min(trials, sequences)
        by_score = score_interval(mean, trials)
        return min(low, by_score[0]), max(high, by_score[1])
    return low, high


@pytest.mark.parametrize("name", MEASURES)
def test_intervals_in_loops(swept, intervals, truth, name):
    """Intervals of levels and changes are those of the same resamples, in loops."""
    where, of = MEASURES[name]
    events = xr.open_dataset(swept / "analysis" / "checkpoint_metrics.nc", group="events", engine="netcdf4")
    names = events["split"].values
    order = intervals["split"].values.tolist()
    counts = resample_counts(np.array([order.index(n) for n in names]), seed=INTERVAL_SEED).astype(int)
    split = "validation_iid"  # some of its answers are right
    samples = {}
    for step in STEPS[:2]:
        sequences = by_sequence(truth[step]["reads"], of, split)
        drawn = counts[:, names == split]
        assert drawn.shape[1] == len(sequences)
        means = []
        for row in drawn:
            values = [value for times, sequence in zip(row, sequences, strict=True) for value in sequence * times]
            means.append(sum(values) / len(values))
        samples[step] = np.array(means)
        ours = intervals[name].sel(step=step, split=split, **where).values
        everything = [value for sequence in sequences for value in sequence]
        expected = [np.mean(everything), *ends(np.mean(everything), samples[step], name, len(sequences))]
        np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=2e-5)
    change = intervals[f"{name}_change"].sel(step=STEPS[1], split=split, **where).values[1:]
    moved = np.percentile(samples[STEPS[1]] - samples[STEPS[0]], [2.5, 97.5])
    np.testing.assert_allclose(change, moved, rtol=2e-4, atol=5e-5)


def test_estimates(intervals, means):
    """Estimates are the means over all reads."""
    compared = 0
    for name, variable in intervals.data_vars.items():
        if not name.endswith("_change"):
            estimate = variable.sel(statistic="estimate")
            np.testing.assert_allclose(
                estimate, means[name].transpose(*estimate.dims), rtol=1e-5, atol=1e-6, err_msg=name
            )
            compared += 1
    assert compared == 16 + 2 + 4 + 13 + 2 + 3, "of reads, tokens, the lens, heads, MLPs and probes"


def test_order_of_ends(intervals):
    """Both ends enclose the estimate; the first checkpoint has no change."""
    for name, variable in intervals.data_vars.items():
        low, estimate, high = (variable.sel(statistic=s).values for s in ("low", "estimate", "high"))
        there = np.isfinite(estimate)
        assert (low[there] <= estimate[there] + 1e-5).mean() > 0.99, name
        assert (estimate[there] <= high[there] + 1e-5).mean() > 0.99, name
        if name.endswith("_change"):
            assert np.isnan(variable.isel(step=0)).all(), name


def test_interval_of_a_slice(swept, intervals, truth):
    """Against loops: the reads of sequences with two active keys, among all sequences of all splits."""
    events = xr.open_dataset(swept / "analysis" / "checkpoint_metrics.nc", group="events", engine="netcdf4")
    names = events["split"].values
    order = intervals["split"].values.tolist()
    counts = resample_counts(np.array([order.index(n) for n in names]), seed=INTERVAL_SEED).astype(int)
    right = {}
    for read in truth[200]["reads"]:
        own = right.setdefault(read["sample_id"], [])
        own.extend([read["correct"]] if read["axes"]["active_keys"] == 2 else [])
    sequences = [right[sample] for sample in events["sequence"].values.tolist()]
    rates = []
    for row in counts:
        drawn = [x for times, sequence in zip(row, sequences, strict=True) for x in sequence * times]
        rates.append(sum(drawn) / len(drawn))
    ours = intervals["slice_accuracy"].sel(step=200, split="all", axis_value="active_keys=2").values
    np.testing.assert_allclose(ours[1:], ends(ours[0], rates, "slice_accuracy", len(names)), atol=1e-5)


def test_rate_without_spread(intervals):
    """A rate on which all sequences agree is not certain."""
    rates = intervals["answer_accuracy"]  # no held-out answer is right at the first step
    estimate, low, high = (rates.sel(statistic=s).values for s in ("estimate", "low", "high"))
    assert (estimate == 1).any() or (estimate == 0).any()
    assert (high - low)[np.isin(estimate, (0.0, 1.0))].min() > 0.01
    assert low[np.isfinite(low)].min() >= 0 and high[np.isfinite(high)].max() <= 1
