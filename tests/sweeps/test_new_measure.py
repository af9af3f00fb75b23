"""Measures declared in one place: the sweep computes them, and every output has them."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.artifacts.tables import read_dataset
from kvjax.config.files import find_config, read_config
from kvjax.config.windows import WindowConfig
from kvjax.measure import registry
from kvjax.measure.declaration import Measure, RowField
from kvjax.report.figures import trajectory_figure
from kvjax.windows.trajectories import run_trajectories
from tests.helpers.building import STEPS, read_lines
from tests.helpers.sweeping import sweep

SURPRISE = Measure(
    "surprise",
    "read",
    "nats",
    "minus the log probability of the answer",
    sources=("read/surprise",),
    compute=lambda reads: -jnp.log(reads.distribution[1]),
    fields=(RowField("surprise", delta=True, trigger="surprise"),),
    label="surprise of the answer",
    panel="attention",
)
STATE_NORM = Measure(
    "state_norm",
    "stage",
    "1",
    "L2 norm of the state at p_e",
    sources=("stage/norm",),
    compute=lambda reads: jnp.linalg.norm(jnp.split(reads.states_GxBxQxD, 2)[0], axis=-1),
    fields=(RowField("state_norm_by_layer"),),
)
WRITE_POWER = Measure(
    "mlp_write_power",
    "mlp",
    "1",
    "squared L2 norm of an MLP's output at p_e",
    sources=("mlp/write_power",),
    compute=lambda reads: jnp.sum(reads.at_prediction("mlp_out") ** 2, axis=-1),
    fields=(RowField("write_power"),),
)
MEASURES = (SURPRISE, STATE_NORM, WRITE_POWER)


@pytest.fixture(scope="module")
def run(untied_run, truth, tmp_path_factory):
    """A run swept while three more measures are declared, until the module's tests are done.

    The run of `truth` is swept before, without them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "MEASURES", (*registry.MEASURES, *MEASURES))
        folder = shutil.copytree(untied_run, tmp_path_factory.mktemp("new_measure") / "run")
        sweep(folder, ablations=("zero",), probe="none", event_drift=False)
        yield folder


def arrays(run, group=None):
    """Returns a group of the sweep's netCDF file."""
    return read_dataset(run / "analysis" / "checkpoint_metrics.nc", group=group, expected="a sweep's arrays")


@pytest.fixture(scope="module")
def by_hand(run):
    """Mean surprise by step and split, from the probability of each read's answer."""
    events = arrays(run, "events")
    surprise = np.where(events["is_read"].values.astype(bool), -np.log(events["read_confidence"].values), 0.0)
    reads = events["is_read"].values.sum(axis=1)
    means = {}
    for split in ("all", *np.unique(events["split"].values)):
        members = (events["split"].values == split) | (split == "all")
        means[split] = surprise[:, members].sum(axis=(1, 2)) / reads[members].sum()
    return means


def test_new_measure_in_the_means(run, by_hand):
    """The root group has it by split, with its declared units and description."""
    means = arrays(run)["surprise"]
    assert means.attrs == {"units": "nats", "long_name": "minus the log probability of the answer"}
    for split, expected in by_hand.items():
        np.testing.assert_allclose(means.sel(split=split), expected, rtol=1e-5)


def test_new_measure_with_its_interval(run, by_hand):
    """Its interval, and that of its change, surround the estimate."""
    intervals = arrays(run, "intervals")
    low, estimate, high = (
        intervals["surprise"].sel(statistic=statistic, split="all").values for statistic in ("low", "estimate", "high")
    )
    np.testing.assert_allclose(estimate, by_hand["all"], rtol=1e-5)
    assert (low < estimate).all() and (estimate < high).all()
    change = intervals["surprise_change"].sel(split="all", step=200, statistic="estimate")
    assert float(change) == pytest.approx(by_hand["all"][1] - by_hand["all"][0], rel=1e-4, abs=1e-5)


def test_new_measure_in_the_rows(run, by_hand):
    """Rows have the declared field and its change from the previous checkpoint."""
    rows = read_lines(run / "analysis" / "checkpoint_metrics.jsonl")
    assert [row["step"] for row in rows] == list(STEPS)
    np.testing.assert_allclose([row["surprise"] for row in rows], by_hand["all"], rtol=1e-5)
    assert rows[0]["delta_surprise"] is None
    assert rows[1]["delta_surprise"] == pytest.approx(rows[1]["surprise"] - rows[0]["surprise"], abs=1e-9)


def test_new_measure_of_stages(run, truth):
    """A measure of stages has the mean over reads at each stage: in the means, with an interval, and in the rows."""
    means, intervals = arrays(run)["state_norm"].sel(split="all"), arrays(run, "intervals")["state_norm"]
    for step, row in zip(STEPS, read_lines(run / "analysis" / "checkpoint_metrics.jsonl"), strict=True):
        for stage in means["stage"].values:
            expected = np.mean([np.linalg.norm(read["state"][stage]) for read in truth[step]["reads"]])
            assert row["state_norm_by_layer"][stage] == pytest.approx(expected, rel=1e-4)
            at = {"step": step, "stage": stage}
            assert float(means.sel(at)) == pytest.approx(expected, rel=1e-4)
            low, high = (float(intervals.sel(at | {"split": "all", "statistic": end})) for end in ("low", "high"))
            assert low < expected < high
    assert arrays(run, "events")["stage_norm"].dims == ("step", "sequence", "stage")


def test_new_measure_of_mlps(run, truth):
    """A measure of MLPs stands in their table, beside the declared ones."""
    for row in read_lines(run / "analysis" / "component_candidates" / "mlps.jsonl"):
        expected = np.mean([read["write_norm"][row["layer"]] ** 2 for read in truth[row["step"]]["reads"]])
        assert row["write_power"] == pytest.approx(expected, rel=1e-4)
    assert {"mlp_write_power", "mlp_write_power_change"} <= set(arrays(run)) & set(arrays(run, "intervals"))
    assert arrays(run, "events")["mlp_write_power"].dims == ("step", "sequence", "layer")


def test_new_measure_as_trajectories(run, by_hand):
    """Its declared trigger has a trajectory on every split, with resamples around it."""
    config = read_config(find_config("default", "windows"), WindowConfig).model_copy(update={"resamples": 200})
    trajectories = run_trajectories(arrays(run), arrays(run, "events"), config)
    found = {metric.split: m for m, metric in enumerate(trajectories.metrics) if metric.kind == "surprise"}
    assert found.keys() == by_hand.keys() - {"all"}
    for split, m in found.items():
        np.testing.assert_allclose(trajectories.values_CxM[:, m], by_hand[split], rtol=1e-5)
        spread = trajectories.samples_JxCxM[:, :, m].std(axis=0)
        assert (spread > 0).all()
        np.testing.assert_array_less(
            np.abs(trajectories.samples_JxCxM[:, :, m].mean(axis=0) - by_hand[split]), 3 * spread
        )


def test_new_measure_in_a_figure(run, by_hand):
    """The attention panel draws it under its declared label, with units."""
    figure = trajectory_figure([arrays(run)])
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[2].get_lines()}
    np.testing.assert_allclose(lines["surprise of the answer (nats)"], by_hand["validation_iid"], rtol=1e-5)


def test_results_from_before_a_measure(run):
    """A stored result without the measure's array is measured again; complete ones are reused."""
    stored = run / "analysis" / "measured" / "step_000200.npz"
    with np.load(stored) as arrays_before:
        kept = {name: arrays_before[name] for name in arrays_before.files if name != "read/surprise"}
    assert "read/correct" in kept
    np.savez(stored, **kept)
    report = sweep(run, ablations=("zero",), probe="none", event_drift=False)
    assert report.log.measured == [200] and sorted(report.log.reused) == [100, 300]
    assert report.rows[1]["surprise"] is not None
