"""The evidence for roles, by hand: what a head attends to, adds and causes at a stage."""

from __future__ import annotations

import numpy as np
import pytest

from kvjax.compare.matching import role_scores
from kvjax.compare.roles import ROLES, role_trajectories
from tests.helpers.comparing import seed_run


@pytest.fixture
def run():
    """A run of 2 layers with 4 heads whose attributions, attentions and drops are known at every step."""
    one = seed_run("a", forms_at=300)
    metrics = one.results.metrics
    for name in ("head_binding_attention", "head_current_value_attention", "head_direct_logit_attribution"):
        metrics[name][:] = 0.0
    metrics["mlp_direct_logit_attribution"][:] = 0.0
    metrics["head_accuracy_drop"][:] = 0.0
    return one


def test_writer_by_hand(run):
    """A head's share is of all positive attributions, MLPs' too: 3 of 3 + 1 + 4, and a negative one is none."""
    metrics = run.results.metrics
    metrics["head_direct_logit_attribution"][:, :, 0, 1] = 3.0
    metrics["head_direct_logit_attribution"][:, :, 1, 0] = 1.0
    metrics["head_direct_logit_attribution"][:, :, 1, 3] = -5.0
    metrics["mlp_direct_logit_attribution"][:, :, 1] = 4.0
    found = role_trajectories(run).attention["writer"][-1]
    np.testing.assert_allclose(found, [0, 3 / 8, 0, 0, 1 / 8, 0, 0, 0])


def test_scores_over_a_stage_by_hand(run):
    """Attention and drops are averaged over the stage's steps alone, then multiplied: 0.6 times 0.3 of 0.3 + 0.1."""
    metrics = run.results.metrics
    metrics["head_binding_attention"].loc[{"step": 300, "layer": 0, "head": 2}] = 0.4
    metrics["head_binding_attention"].loc[{"step": 400, "layer": 0, "head": 2}] = 0.8
    metrics["head_accuracy_drop"].loc[{"step": 300, "layer": 0, "head": 2}] = 0.2
    metrics["head_accuracy_drop"].loc[{"step": 400, "layer": 0, "head": 2}] = 0.4
    metrics["head_accuracy_drop"].loc[{"step": [300, 400], "layer": 1, "head": 1}] = 0.1
    metrics["head_accuracy_drop"].loc[{"step": 500}] = 9.0
    scores = role_scores(role_trajectories(run).over([300, 400], patched=False))
    expected = np.zeros(8)
    expected[2] = 0.6 * 0.3 / 0.4
    np.testing.assert_allclose(scores[:, ROLES.index("binder")], expected)


def test_drops_are_of_the_ranking_ablation(run):
    """Drops of another kind of ablation, here zero, say nothing."""
    metrics = run.results.metrics
    metrics["head_binding_attention"][:] = 1.0
    metrics["head_accuracy_drop"].loc[{"ablation": "zero", "layer": 0, "head": 0}] = 1.0
    metrics["head_accuracy_drop"].loc[{"ablation": "role_mean", "layer": 0, "head": 3}] = 0.5
    scores = role_scores(role_trajectories(run).over([800], patched=False))
    assert scores[:, ROLES.index("binder")].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
