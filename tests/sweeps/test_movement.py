"""Movement of single reads' states and CKA against PyTorch's states and the textbook formulas; logistic probes."""

import numpy as np
import pytest
import xarray as xr

from kvjax.model.sites import stage_names
from kvjax.sweeps import movement, stream
from kvjax.sweeps.movement import read_states
from tests.building import SMALL_MODEL, STEPS
from tests.sweeping import sweep

STAGES = stage_names(SMALL_MODEL["n_layers"])
ROLES = {"prediction": "state", "support": "support_state"}


@pytest.fixture(scope="module")
def means(swept):
    return xr.open_dataset(swept / "analysis" / "checkpoint_metrics.nc", engine="netcdf4").load()


def states(truth, step, role, stage, split=None):
    return np.stack([r[ROLES[role]][stage] for r in truth[step]["reads"] if split in (None, r["split"])])


def hsic(k, m):
    """The biased Hilbert-Schmidt independence criterion of two kernels, with an explicit centring matrix."""
    n = len(k)
    centre = np.eye(n) - np.ones((n, n)) / n
    return np.trace(k @ centre @ m @ centre)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("stage", ["layer_0_post_mlp", "final_norm"])
def test_event_drift_and_cka(means, truth, role, stage):
    for before, step, suffix in ((100, 200, ""), (300, 200, "_to_reference")):
        a, b = states(truth, step, role, stage), states(truth, before, role, stage)
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        at = {"step": step, "position_role": role, "stage": stage}
        ours = float(means[f"residual_event_drift{suffix}"].sel(split="all", **at))
        np.testing.assert_allclose(ours, np.mean(1 - cosines), rtol=1e-4, atol=1e-6)
        theirs = hsic(a @ a.T, b @ b.T) / np.sqrt(hsic(a @ a.T, a @ a.T) * hsic(b @ b.T, b @ b.T))
        np.testing.assert_allclose(float(means[f"residual_cka{suffix}"].sel(**at)), theirs, rtol=1e-4)
        a, b = (states(truth, s, role, stage, "structural_ood") for s in (step, before))
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        ours = float(means[f"residual_event_drift{suffix}"].sel(split="structural_ood", **at))
        np.testing.assert_allclose(ours, np.mean(1 - cosines), rtol=1e-4, atol=1e-6)


def test_what_does_not_exist_and_what_is_the_same(means):
    assert np.isnan(means["residual_event_drift"].sel(step=STEPS[0])).all()
    assert np.isnan(means["residual_cka"].sel(step=STEPS[0])).all()
    last = means.sel(step=STEPS[-1])
    assert float(abs(last["residual_event_drift_to_reference"]).max()) < 1e-6
    moving = last["residual_cka_to_reference"]
    np.testing.assert_allclose(moving, 1.0, atol=1e-5)


def test_movement_is_kept_and_made_again_when_a_neighbour_changes(small_run):
    first = sweep(small_run).dataset
    folder = small_run / "analysis" / "measured"
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob("movement_*")}
    assert len(written) == 2 * len(STEPS) - 1
    second = sweep(small_run).dataset
    assert written == {path.name: path.stat().st_mtime_ns for path in folder.glob("movement_*")}
    assert first["residual_cka"].equals(second["residual_cka"])
    (small_run / "checkpoints" / "step_000200.pt").unlink()
    third = sweep(small_run).dataset  # step 300 now follows step 100
    assert float(third["residual_event_drift"].sel(step=300, split="all", position_role="support")[2]) != float(
        second["residual_event_drift"].sel(step=300, split="all", position_role="support")[2]
    )


def test_states_are_formed_again_only_for_checkpoints_measured_before(small_run, monkeypatch):
    formed = []

    def count(*args):
        formed.append(args)
        return read_states(*args)

    monkeypatch.setattr(movement, "read_states", count)
    at_once = sweep(small_run).dataset
    assert formed == []
    for path in (small_run / "analysis" / "measured").glob("movement_*"):
        path.unlink()
    again = sweep(small_run).dataset
    assert len(formed) == len(STEPS)
    for name in ("residual_event_drift", "residual_event_drift_to_reference", "residual_cka"):
        np.testing.assert_allclose(again[name], at_once[name], rtol=1e-4, atol=1e-6)


def test_without_event_drift_the_rest_is_the_same(small_run, swept):
    report = sweep(small_run, event_drift=False)
    assert "residual_cka" not in report.dataset and report.dataset["answer_accuracy"].size


def test_side_by_side_as_on_an_accelerator_moves_the_same(small_run, means, monkeypatch):
    as_here = stream.plan_chunks
    monkeypatch.setattr(
        stream, "plan_chunks", lambda *args, **given: as_here(*args, **given | {"backend": "gpu", "num_devices": 1})
    )
    ours = sweep(small_run, ablations=("zero",), probe="none").dataset
    for name in ("residual_event_drift", "residual_event_drift_to_reference", "residual_cka"):
        np.testing.assert_allclose(ours[name], means[name], rtol=1e-4, atol=1e-6)


def test_devices_share_one_program(small_run):
    """Compared where each checkpoint's states are, one after another, every device would compile its own."""
    programs = (movement._spread_of_checkpoints, movement._movement_of_pairs, movement.with_spread, movement.movement)
    for program in programs:
        program.clear_cache()
    report = sweep(small_run)
    assert len(report.log.later_call_seconds) == 1, "two calls, the second filled up"
    assert [program._cache_size() for program in programs] == [1, 1, 0, 0]
