"""First-order scores beside the exact effects that activation and path patching stored, by hand."""

import numpy as np
import pytest
import xarray as xr

from kvjax.intervene.kinds.attribution_patching import ESTIMATORS, beside_exact
from kvjax.intervene.metrics import METRICS
from kvjax.intervene.recovery import PairGroups

NODES, PATHS = ["embedding", "L0H0", "L0.mlp"], ["embedding->logits", "L0H0->logits"]
# Of two pairs of one kind, summed over 1 and 3 reads: the corrupted run's metric, and that with a clean node.
CORRUPTED = np.array([-1.0, -3.0])
WHOLE = np.array([[1.0, 5.0], [0.0, -3.0], [-1.0, -2.0]])  # [node, pair]


@pytest.fixture
def groups():
    return PairGroups({"value": np.arange(2)}, np.array([1, 3]), np.array([[1, 1], [2, 0], [0, 2]]))


@pytest.fixture
def scores():
    shared = {"statistic": ["estimate", "low", "high"], "estimator": list(ESTIMATORS), "pair_kind": ["value"]}
    dataset = xr.Dataset(coords={**shared, "step": [7], "pair": ["a", "b"], "node": NODES, "path": PATHS})
    for dim, values in (("node", [2.0, 0.5, -3.0]), ("path", [1.0, 2.0])):
        found = np.broadcast_to(values, (3, 2, 1, 1, len(values)))
        dataset[f"{dim}_score"] = (("statistic", "estimator", "pair_kind", "step", dim), found)
    runs = xr.DataArray(np.zeros((3, 1, 1)), dims=("statistic", "pair_kind", "step"))
    sides = ["clean", "corrupted"]
    dataset["metric_of_runs"] = runs.expand_dims(metric=list(METRICS), run=sides)
    dataset["answer_accuracy_of_runs"] = runs.expand_dims(answer=sides, run=sides).assign_attrs(chance=0.1)
    fails = xr.DataArray(np.zeros((1, 1), bool), dims=("pair_kind", "step"))
    dataset["clean_run_fails"] = fails.expand_dims(failure=["no_gap"], metric=list(METRICS))
    return dataset.assign_attrs(metric="answer_loss")


def of_answer_loss(dataset):
    """Stores effects as those of one metric, beside another's that must not be read."""
    return xr.concat([dataset + 50, dataset], xr.Variable("metric", ["logit_difference", "answer_loss"]))


@pytest.fixture
def nodes():
    """Activation patching's arrays, with places, roles and directions that must not be read."""
    places, roles = ["layer_0_post_mlp", "L0.mlp", "L0H0", "embedding"], ["prediction", "all"]
    dataset = xr.Dataset(
        coords={"direction": ["noising", "denoising"], "step": [7], "pair": ["a", "b"], "place": places}
    ).assign_coords(position_role=roles)
    metric = xr.DataArray(np.full((2, 1, 2, 4, 2), 99.0), dims=("direction", "step", "pair", "place", "position_role"))
    for node, of_pairs in zip(NODES, WHOLE, strict=True):
        metric[1, 0, :, places.index(node), 1] = of_pairs
    dataset["metric_by_role"], dataset["metric_corrupted"] = metric, (("step", "pair"), CORRUPTED[None])
    return of_answer_loss(dataset)


@pytest.fixture
def paths():
    dataset = xr.Dataset(coords={"direction": ["denoising"], "step": [7], "pair": ["a", "b"], "path": PATHS[::-1]})
    dataset["metric_by_path"] = (("direction", "step", "pair", "path"), np.array([[[[3.0, -1.0], [5.0, -3.0]]]]))
    dataset["metric_corrupted"] = (("step", "pair"), CORRUPTED[None])
    return of_answer_loss(dataset)


def test_scores_beside_stored_effects(scores, nodes, paths, groups):
    """Exact effects are stored metrics minus the corrupted run's, per read; ranks are compared."""
    outcome = beside_exact(scores, {"activation_patching": nodes, "path_patching": paths}, groups)
    exact = outcome.dataset["node_exact"].sel(statistic="estimate", pair_kind="value", step=7)
    assert exact.values.tolist() == [(2 + 8) / 4, 1 / 4, 1 / 4]
    assert outcome.dataset["path_exact"].sel(statistic="estimate").values.ravel().tolist() == [0.0, 12 / 4]
    effects = outcome.summary["effects"]
    found = {(e["of"], e["estimator"]): e["rank_correlation"] for e in effects["rank_correlation_with_exact"]}
    assert found["edges", "gradient"] == 1.0
    # Ranks 3, 2, 1 beside 3, 1.5, 1.5: the covariance over the two spreads.
    assert found["nodes", "integrated_gradients"] == pytest.approx(1.5 / np.sqrt(2 * 1.5), abs=1e-6)
    assert [row["node"] for row in effects["nodes"]] == ["L0.mlp", "embedding", "L0H0"], "the largest scores first"
    assert effects["nodes"][1]["exact"]["estimate"] == 2.5 and effects["nodes"][1]["score"]["gradient"]["low"] == 2.0
    assert outcome.summary["missing"] == []


def test_scores_without_stored_effects(scores, paths, groups):
    """Without the effects of a kind its scores stand alone, and the summary names the kind."""
    alone = beside_exact(scores, {}, groups)
    assert alone.summary["missing"] == ["activation_patching", "path_patching"]
    assert alone.summary["effects"]["rank_correlation_with_exact"] == []
    assert all(row["exact"] is None for row in alone.summary["effects"]["nodes"])
    later = beside_exact(alone.dataset, {"path_patching": paths}, groups)
    assert later.summary["missing"] == ["activation_patching"]
    assert "node_exact" not in later.dataset and later.summary["effects"]["edges"][0]["exact"]["estimate"] == 3.0
