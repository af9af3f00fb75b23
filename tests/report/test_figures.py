"""Figures show the sweep's own numbers."""

import matplotlib
import numpy as np
import pytest
import xarray as xr

from kvjax.report.figures import head_ablation_figure, save_figure, trajectory_figure

STEPS, SPLITS = [100, 200, 400], ["all", "validation_iid", "heldout_pairs"]


@pytest.fixture(params=[5, 6])
def run(request):
    rng = np.random.default_rng(request.param)
    curves = ("answer_accuracy", "answer_margin", "r", "key_selectivity", "recency_selectivity")
    data = {name: (("step", "split"), rng.random((3, 3))) for name in curves}
    dims = ("step", "ablation", "split", "layer", "head")
    data["head_accuracy_drop"] = (dims, rng.random((3, 2, 3, 2, 2)) - 0.5)
    coords = {"step": STEPS, "split": SPLITS, "ablation": ["zero", "role_mean"], "layer": [0, 1], "head": [0, 1]}
    return xr.Dataset(data, coords, {"seed": request.param, "ranked_by": "role_mean"})


def test_trajectories(run):
    """Trajectories draw the runs' own curves."""
    figure = trajectory_figure([run, run])
    axes = np.array(figure.axes).reshape(2, 3)
    drawn = {line.get_label(): line.get_xydata() for line in axes[0, 0].get_lines()}
    assert set(drawn) == {"validation_iid", "heldout_pairs"}
    np.testing.assert_array_equal(drawn["heldout_pairs"][:, 0], STEPS)
    np.testing.assert_array_equal(drawn["heldout_pairs"][:, 1], run["answer_accuracy"].sel(split="heldout_pairs"))
    attention = {line.get_label(): line.get_ydata() for line in axes[1, 2].get_lines()}
    np.testing.assert_array_equal(attention["key selectivity"], run["key_selectivity"].sel(split="validation_iid"))


def test_head_map(run):
    """The map has one row per head, one scale for all runs, and drops under the kind of ablation that ranks."""
    figure = head_ablation_figure([run, -1.0 * run.assign_attrs(seed=1)])
    images = [axis.images[0] for axis in figure.axes[:2]]
    drops = run["head_accuracy_drop"].sel(split="all", ablation="role_mean")
    np.testing.assert_array_equal(images[0].get_array()[2], drops.sel(layer=1, head=0))
    assert images[0].get_clim() == images[1].get_clim() == (-float(np.abs(drops).max()), float(np.abs(drops).max()))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["L0H0", "L0H1", "L1H0", "L1H1"]
    assert figure.axes[2].get_ylabel() == "accuracy lost by role-mean ablation"


def test_head_map_of_an_older_sweep(run):
    """Arrays of a sweep that names no ranking are drawn with zero ablation, which it ranked by."""
    older = run.drop_attrs()
    older.attrs["run_name"] = "older"
    image = head_ablation_figure([older]).axes[0].images[0]
    drops = run["head_accuracy_drop"].sel(split="all", ablation="zero", layer=1, head=0)
    np.testing.assert_array_equal(image.get_array()[2], drops)


def test_saved_figures(run, tmp_path):
    """Figures are saved as PNG and SVG, and are not blank."""
    paths = save_figure(trajectory_figure([run]), tmp_path, "trajectories")
    assert [path.suffix for path in paths] == [".png", ".svg"]
    image = matplotlib.image.imread(paths[0])
    assert image.shape[1] > 1000 and image[..., :3].std() > 0.01, "not blank"
    assert "<svg" in paths[1].read_text()[:1000]


def test_equal_figures(run, tmp_path):
    """Equal figures are equal files, whenever they are drawn."""
    both = [save_figure(trajectory_figure([run]), tmp_path / folder, "trajectories") for folder in ("one", "other")]
    assert all(ours.read_bytes() == theirs.read_bytes() for ours, theirs in zip(*both, strict=True))
