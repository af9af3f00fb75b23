"""A sweep's measures of weights against PyTorch's tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvjax.artifacts.tables import read_dataset
from kvjax.config.files import find_config, read_config
from kvjax.config.windows import WindowConfig
from kvjax.windows.trajectories import run_trajectories
from tests.helpers.building import STEPS, read_lines

# Names of PyTorch's modules by those of tensor groups.
MODULES = {
    "token_embedding": "token_embedding",
    "layer_0_q_proj": "blocks.0.attn.q_proj",
    "layer_2_fc_out": "blocks.2.ff.fc_out",
    "layer_1_ln_2": "blocks.1.ln_2",
    "final_norm": "final_norm",
}


def dataset(run):
    return read_dataset(run / "analysis" / "checkpoint_metrics.nc", expected="a sweep's arrays")


@pytest.fixture(scope="module")
def means(swept):
    return dataset(swept)


@pytest.fixture(scope="module")
def tensors(swept):
    """step -> tensor group -> all its numbers, from the checkpoint files."""
    found = {}
    for step in STEPS:
        state = torch.load(swept / "checkpoints" / f"step_{step:06d}.pt", weights_only=False)["model_state"]
        found[step] = {
            group: np.concatenate(
                [x.double().numpy().ravel() for name, x in state.items() if name.startswith(f"{module}.")]
            )
            for group, module in MODULES.items()
        }
        found[step]["all"] = np.concatenate([x.double().numpy().ravel() for x in state.values()])
    return found


@pytest.mark.parametrize("group", [*MODULES, "all"])
def test_changes_of_tensor_groups(means, tensors, group):
    """Relative changes and the cosine of successive updates are those of PyTorch's tensors."""
    first, second, third = (tensors[step][group] for step in STEPS)
    at = means.sel(tensor_group=group)
    thousands = (STEPS[1] - STEPS[0]) / 1000
    change = [np.linalg.norm(b - a) / np.linalg.norm(a) / thousands for a, b in ((first, second), (second, third))]
    np.testing.assert_allclose(at["weight_change"], [np.nan, *change], rtol=1e-9)
    from_first = [np.linalg.norm(x - first) / np.linalg.norm(first) for x in (first, second, third)]
    np.testing.assert_allclose(at["weight_change_from_first"], from_first, rtol=1e-9)
    a, b = second - first, third - second
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    np.testing.assert_allclose(at["weight_update_cosine"], [np.nan, np.nan, cosine], rtol=1e-6)


def test_weights_in_the_rows(swept, means):
    """Rows have the whole model's changes, and each group's; component tables have ranks, norms and overlaps."""
    for row in read_lines(swept / "analysis" / "checkpoint_metrics.jsonl")[1:]:
        assert row["weight_change"] == row["weight_change_by_group"]["all"] > 0
        own = means["weight_change"].sel(step=row["step"], tensor_group="final_norm")
        assert row["weight_change_by_group"]["final_norm"] == float(own)
    for row in read_lines(swept / "analysis" / "component_candidates" / "heads.jsonl"):
        values = means["head_singular_values"].sel({x: row[x] for x in ("step", "layer", "head")})
        for matrix in ("qk", "ov"):
            own = values.sel(matrix=matrix).values
            assert row[f"{matrix}_norm"] == pytest.approx(np.sqrt((own**2).sum()))
            shares = own / own.sum()
            assert row[f"{matrix}_effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
            assert row[f"{matrix}_participation_ratio"] == pytest.approx((own**2).sum() ** 2 / (own**4).sum())
            assert (row[f"{matrix}_direction_overlap"] is None) == (row["step"] == STEPS[0])
    state = torch.load(swept / "checkpoints" / f"step_{STEPS[-1]:06d}.pt", weights_only=False)["model_state"]
    for row in read_lines(swept / "analysis" / "component_candidates" / "mlps.jsonl")[-3:]:
        for kernel in ("fc_in", "fc_out"):
            norm = state[f"blocks.{row['layer']}.ff.{kernel}.weight"].norm().item()
            assert row[f"{kernel}_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.fixture(scope="module")
def trajectories(swept, means):
    """The swept run's trajectories by kind of trigger: (metric, values, range over resamples)."""
    config = read_config(find_config("default", "windows"), WindowConfig).model_copy(update={"resamples": 50})
    events = read_dataset(swept / "analysis" / "checkpoint_metrics.nc", group="events", expected="a sweep's arrays")
    found = run_trajectories(means, events, config)
    by_kind = {}
    for m, metric in enumerate(found.metrics):
        spread = np.ptp(found.samples_JxCxM[:, :, m], axis=0)
        by_kind.setdefault(metric.kind, []).append((metric, found.values_CxM[:, m], spread))
    return by_kind


def test_trajectories_of_weights(trajectories, means):
    """Changes are taken by their logarithm, ranks as they are, once for all splits; no resample differs."""
    ((metric, values, spread),) = trajectories["weight_change"]
    np.testing.assert_allclose(values, np.log10(means["weight_change"].sel(tensor_group="all")))
    assert (metric.split, metric.resampled) == ("all", False) and not np.nan_to_num(spread).any()
    for matrix in ("qk", "ov"):
        ranks = trajectories[f"{matrix}_effective_rank"]
        assert [metric.head for metric, _, _ in ranks] == [0, 1, 2, 3] * 3
        for metric, values, spread in ranks:
            at = {"matrix": matrix, "layer": metric.layer, "head": metric.head}
            np.testing.assert_array_equal(values, means["head_effective_rank"].sel(at))
            assert metric.split == "all" and not spread.any()


def test_trajectories_of_separations(trajectories, means):
    """Every head has one on every split, which varies with the sequences drawn."""
    found = trajectories["qk_separation"]
    assert len(found) == 12 * (means.sizes["split"] - 1)
    for metric, values, spread in found:
        at = {"split": metric.split, "layer": metric.layer, "head": metric.head}
        np.testing.assert_allclose(values, means["head_qk_separation"].sel(at), rtol=1e-9)
        assert metric.resampled and (spread > 0).all()


def test_overlap_with_the_reference(means):
    """The reference keeps all of its own directions."""
    overlap = means["head_direction_overlap_to_reference"]
    np.testing.assert_allclose(overlap.sel(step=STEPS[-1]), 1.0)
    assert float(overlap.sel(step=STEPS[0]).min()) < 1
    assert ((overlap > 0) & (overlap < 1 + 1e-9)).all()
