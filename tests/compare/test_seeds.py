"""Comparison of seeds with planted circuits: what formed in how many, where the roles sit, and what differs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr

from kvjax.artifacts.comparison_schema import Comparison
from kvjax.compare.findings import findings
from kvjax.compare.labelled import groups_of
from kvjax.compare.roles import role_trajectories
from kvjax.compare.seeds import compare
from kvjax.compare.settings import CompareSettings
from kvjax.errors import InputError
from kvjax.report.comparison_charts import comparison_charts, role_chart
from kvjax.report.comparison_page import page
from tests.helpers.comparing import STEPS, seed_run
from tests.helpers.story import write_patching

EXACT = CompareSettings(null_draws=100)


@pytest.fixture(scope="module")
def five():
    """Five seeds: four form the lookup at steps 300 to 500 with heads elsewhere, one does not by its end."""
    runs = [
        seed_run("a", forms_at=300, binder=0, retriever=1),
        seed_run("b", forms_at=400, binder=3, retriever=2),
        seed_run("c", forms_at=400, binder=1, retriever=0),
        seed_run("d", forms_at=500, binder=2, retriever=3),
        seed_run("e", forms_at=None),
    ]
    made = compare(runs, EXACT)
    made.document["findings"] = findings(made.document)
    return made


def test_document_of_five_seeds(five):
    """The document fits its schema once its arrays have a hash."""
    document = json.loads(json.dumps(five.document)) | {"arrays": {"sha256": "0" * 64, "bytes": 1}}
    assert Comparison.model_validate(document).runs[3].best_step == 500


def test_births_with_a_censored_seed(five):
    """Four of five formed; the share that has not is 4/5, 2/5, 1/5, so that the median is 400."""
    birth = five.document["births"]["answer_accuracy"]
    assert (birth["formed"], birth["total"], birth["median"]) == (4, 5, 400)
    assert [(point["step"], round(point["share"], 9)) for point in birth["curve"]] == [
        (300, 0.8),
        (400, 0.4),
        (500, 0.2),
    ]
    assert [(run["run"], run["step"], run["formed"]) for run in birth["runs"]][-1] == ("e", 800, False)


def test_order_of_five_seeds(five):
    """Attention moves one interval before accuracy in all seeds that formed; four of four are enough to say so."""
    (pair,) = five.document["order"]["pairs"]
    assert (pair["first"], pair["second"], pair["before"], pair["undetermined"]) == ("r", "answer_accuracy", 4, 1)
    assert pair["holds"]
    assert five.document["order"]["consensus"] == [["r"], ["answer_accuracy"]]


def test_roles_at_moving_addresses(five):
    """Each role's head is found in every seed that has one, and seeds that formed match each other's."""
    winners = {
        role: {one["run"]: one["component"] for one in own} for role, own in five.document["roles"]["winners"].items()
    }
    assert [winners["binder"][run] for run in "abcd"] == ["L0H0", "L0H3", "L0H1", "L0H2"]
    assert [winners["retriever"][run] for run in "abcd"] == ["L1H1", "L1H2", "L1H0", "L1H3"]
    for entry in five.document["matching"]:
        if "e" not in (entry["run_a"], entry["run_b"]):
            for role in ("binder", "retriever"):
                assert entry["heads"][winners[role][entry["run_a"]]] == winners[role][entry["run_b"]]


def test_trajectory_of_a_role(five):
    """The followed binder scores high at the last step in every seed that formed, wherever it is."""
    followed = five.dataset["role_trajectory"].sel(role="binder", step=STEPS[-1])
    assert (followed.sel(run=list("abcd")) > 0.35).all() and followed.sel(run="e") < 0.1
    mean = five.dataset["role_trajectory_mean"].sel(role="binder", step=STEPS[-1])
    assert float(mean) == pytest.approx(float(followed.mean()))


def test_trajectory_without_a_role():
    """A seed whose heads all score 0 has no winner, and no part in the mean; nobody has a role that all lack."""
    runs = [seed_run("a", forms_at=300, binder=1), seed_run("b", forms_at=400, binder=2), seed_run("c", forms_at=400)]
    runs[2].results.metrics["head_binding_attention"][:] = 0.0
    for one in runs:
        one.results.metrics["head_direct_logit_attribution"][:] = 0.0
    made = compare(runs, EXACT)
    winners = made.document["roles"]["winners"]
    assert [one["component"] for one in winners["binder"]] == ["L0H1", "L0H2", None]
    assert [one["component"] for one in winners["writer"]] == [None] * 3
    assert {one["score"] for one in winners["writer"]} == {0.0}
    binder, writer = (made.dataset.sel(role=role) for role in ("binder", "writer"))
    assert binder["role_winner"].values.tolist() == ["L0H1", "L0H2", ""]
    followed = binder["role_trajectory"]
    assert followed.sel(run="c").isnull().all() and followed.sel(run=["a", "b"]).notnull().all()
    both = followed.sel(run=["a", "b"]).values
    np.testing.assert_allclose(binder["role_trajectory_mean"], both.mean(0))
    np.testing.assert_allclose(binder["role_trajectory_low"], both.min(0))
    assert writer["role_trajectory_mean"].isnull().all()
    labels = [line.name for line in role_chart(made.dataset, "binder").lines]
    assert labels == ["a: L0H1", "b: L0H2", "c: none", "mean over runs"]
    drawn = [chart.name for chart in comparison_charts(made.document, made.dataset)]
    assert "role_binder" in drawn and "role_writer" not in drawn


def test_seed_that_stands_apart(five):
    """The seed that has not formed it, though it was followed for longer than the others took, is named."""
    named = {(one["run"], one["what"]) for one in five.document["outliers"]}
    assert ("e", "birth of answer_accuracy") in named
    assert {run for run, _ in named} == {"e"}


def test_seed_that_formed_too_late_to_confirm():
    """A seed at the threshold at its last checkpoint alone is censored before it, not called unformed."""
    runs = [seed_run(name, forms_at=300 + 100 * i) for i, name in enumerate("abcd")]
    made = compare([*runs, seed_run("e", forms_at=None, unconfirmed_from=800)], EXACT)
    document = json.loads(json.dumps(made.document))
    birth = document["births"]["answer_accuracy"]
    assert birth["runs"][-1] == {
        "run": "e",
        "step": 700,
        "formed": False,
        "left_censored": False,
        "unconfirmed_step": 800,
    }
    assert not [one for one in document["outliers"] if one["what"] == "birth of answer_accuracy"]
    document["findings"] = findings(document)
    text = page(document)
    assert "e is censored for answer_accuracy, not without it: it is at 0.9 or above from step 800 on" in text
    assert "| answer_accuracy | 300 | 400 | 500 | 600 | >700, 800? | 4 of 5 |" in text


def test_sentences_of_five_seeds(five):
    """The findings say how many formed, the order, the addresses and who stands apart."""
    text = " ".join(five.document["findings"])
    assert "answer_accuracy reached 0.9 on validation_iid in 4 of 5 runs, between steps 300 and 500" in text
    assert "r before answer_accuracy in 4 of 4" in text
    assert "L0H0 in 1, L0H3 in 1" in text
    assert "e stands apart" in text


def test_page_of_five_seeds(five):
    """The page has a row for each run, marks the censored one and names every run's roles."""
    text = page(five.document)
    assert "| answer_accuracy | 300 | 400 | 400 | 500 | >800 | 4 of 5 |" in text
    assert "| median |" in text and "## Heads by role" in text and "None" not in text


def test_groups_of_the_file(five):
    """The file's groups hold the same numbers, with the order seen from both sides."""
    groups = dict(groups_of(five.dataset, five.document))
    assert float(groups["order"]["order_share"].sel(first="r", second="answer_accuracy")) == 1
    assert float(groups["order"]["order_share"].sel(first="answer_accuracy", second="r")) == 0
    event = groups["events"].sel(event="birth.answer_accuracy")
    assert float(event["event_median"]) == 400 and float(event["event_formed"].sel(run="e")) == 0
    matched = groups["matching"]["matched_head"]
    there = str(matched.sel(run_a="a", run_b="b", component="L0H0").values)
    assert str(matched.sel(run_a="b", run_b="a", component=there).values) == "L0H0"


def test_exact_alignment_refuses_other_steps():
    """Runs with other steps or another planned length are refused by default, with the way on."""
    usual = seed_run("a", forms_at=300)
    with pytest.raises(InputError, match=r"measured steps of a.*align=intersection"):
        compare([usual, seed_run("b", forms_at=500, steps=(*STEPS[::2], 800))], EXACT)
    with pytest.raises(InputError, match=r"planned lengths of a, 800 steps.*found 900 steps"):
        compare([usual, seed_run("b", forms_at=300, planned_steps=900)], EXACT)


@pytest.mark.parametrize(("how", "steps"), [("intersection", (100, 300, 500, 700)), ("interpolate", STEPS[:7])])
def test_alignment_of_other_steps(how, steps):
    """Asked for, runs stand side by side at common or at interpolated steps, and the difference is noted."""
    runs = [seed_run("a", forms_at=500), seed_run("b", forms_at=500, steps=STEPS[::2])]
    made = compare(runs, CompareSettings(align=how, null_draws=20))
    assert tuple(made.dataset["step"].values) == steps
    assert any("different measured steps" in note for note in made.document["alignment"]["notes"])
    accuracy = made.dataset["answer_accuracy"].sel(run="b", split="validation_iid")
    assert not np.isnan(accuracy).any()
    if how == "interpolate":
        assert float(accuracy.sel(step=400)) == pytest.approx((0.02 + 0.95) / 2)


def test_probe_sets_that_differ():
    """Runs measured on other probe sets are refused unless that is allowed, and then it is noted."""
    runs = [seed_run("a", forms_at=300), seed_run("b", forms_at=300, probe_set="q")]
    with pytest.raises(InputError, match="the probe set of a"):
        compare(runs, EXACT)
    made = compare(runs, CompareSettings(allow_other_probe_sets=True, null_draws=20))
    assert any("different probe sets" in note for note in made.document["notes"])


def test_models_that_differ():
    """Runs of another shape cannot be matched head by head."""
    with pytest.raises(InputError, match="the shape of a: d_model 8"):
        compare([seed_run("a", forms_at=300), seed_run("b", forms_at=300, d_model=16)], EXACT)


def test_seeds_without_a_circuit():
    """Where nothing formed, nothing is claimed: no births, no phases, no role that chance would not give."""
    made = compare([seed_run(name, forms_at=None) for name in "abcde"], EXACT)
    text = " ".join(findings(made.document))
    assert "in none of 5 runs by step 800" in text
    assert made.document["roles"]["role_stability"]["null"]["probability"] > 0.05
    assert "Chance may explain" in text


def test_roles_stable_beyond_chance():
    """Eight seeds with the same circuit at random addresses: stable roles at addresses that move."""
    generator = np.random.default_rng(0)
    runs = [
        seed_run(f"run{i}", forms_at=300, binder=int(generator.integers(4)), retriever=int(generator.integers(4)))
        for i in range(8)
    ]
    made = compare(runs, EXACT)
    roles = made.document["roles"]
    assert roles["role_stability"]["null"]["probability"] < 0.02
    assert roles["address_stability"]["null"]["probability"] > 0.05
    assert isinstance(made.dataset, xr.Dataset)


def test_unfinished_run():
    """A run that has not reached its planned end is named, for its half-rises may change."""
    runs = [seed_run(name, forms_at=300, planned_steps=900) for name in "ab"]
    made = compare(runs, CompareSettings(null_draws=20))
    assert any("unfinished runs" in note and note.endswith("a, b") for note in made.document["notes"])


def test_effects_from_patching(tmp_path):
    """Causal effects are recoveries of the answer's lead at all positions, denoising; other metrics do not count."""
    places = [f"L{layer}H{head}" for layer in range(2) for head in range(4)]
    recovered = {"swap": [[0.1 * i, 0.0, 1.0] for i in range(8)], "value": [[0.5, 0.0, 1.0]] * 8}
    recovered["stale"] = [[0.3, 0.0, 1.0]] * 8
    path = write_patching(tmp_path / "window_800.json", recovered, places, dict.fromkeys(STEPS[2:], "a"))
    found = role_trajectories(seed_run("patched", forms_at=400, patching=[path]))
    assert [str(head) for head in found.heads] == places
    assert found.patched_steps == list(STEPS[2:])
    np.testing.assert_allclose(found.recoveries["binder"][-1], 0.1 * np.arange(8))
    np.testing.assert_allclose(found.recoveries["retriever"][-1], 0.4)
    np.testing.assert_allclose(found.recoveries["writer"][-1], 0.5)


def test_patching_of_other_checkpoints(tmp_path):
    """Patching of checkpoint files that the sweep did not measure tells nothing of them."""
    places = [f"L{layer}H{head}" for layer in range(2) for head in range(4)]
    recovered = dict.fromkeys(("swap", "value", "stale"), [[0.5, 0.0, 1.0]] * 8)
    path = write_patching(tmp_path / "window_800.json", recovered, places, dict.fromkeys(STEPS, "another"))
    assert role_trajectories(seed_run("patched", forms_at=400, patching=[path])).patched_steps == []
