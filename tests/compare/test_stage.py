"""The stage at which roles are compared, on planted runs whose mechanisms come and go at other steps."""

from __future__ import annotations

import pytest

from kvjax.compare.compared_roles import unpatched
from kvjax.compare.findings import findings
from kvjax.compare.seeds import compare
from kvjax.compare.settings import LAST, CompareSettings
from kvjax.compare.stage import choose_stage
from kvjax.errors import InputError
from kvjax.report.comparison_page import page
from tests.helpers.comparing import HEADS, LAYERS, seed_run
from tests.helpers.story import write_patching

PLACES = [f"L{layer}H{head}" for layer in range(LAYERS) for head in range(HEADS)]
UNPATCHED = dict.fromkeys("abcde", ())


def five(**parts):
    """Five seeds with one early mechanism at moving addresses; in a and b other heads take over at step 600."""
    return [
        seed_run("a", forms_at=300, binder=0, retriever=1, handed_over=(600, 3, 3), **parts),
        seed_run("b", forms_at=400, binder=3, retriever=2, handed_over=(600, 0, 0), **parts),
        seed_run("c", forms_at=400, binder=1, retriever=0, **parts),
        seed_run("d", forms_at=500, binder=2, retriever=3, **parts),
        seed_run("e", forms_at=300, binder=2, retriever=1, **parts),
    ]


def winners(document, role):
    return [one["component"] for one in document["roles"]["winners"][role]]


def patched_at(folder, name, steps, *, binder, failing=()):
    """Writes patching in which one head of layer 0 recovers `swap`, and head 0 of layer 1 the other kinds."""
    swap = [[1.0 if place == f"L0H{binder}" else 0.0, 0.0, 1.0] for place in PLACES]
    other = [[1.0 if place == "L1H0" else 0.0, 0.0, 1.0] for place in PLACES]
    recovered = {"swap": swap, "value": other, "stale": other}
    return write_patching(folder / name / "window.json", recovered, PLACES, dict.fromkeys(steps, "a"), failing=failing)


def test_common_stage_is_the_mechanism_that_all_have():
    """Where two runs have handed over later, roles are those of the birth that all share, not of the last steps."""
    made = compare(five(), CompareSettings(null_draws=100))
    roles = made.document["roles"]
    assert roles["stage"] == "answer_accuracy"
    assert roles["steps"] == {
        "a": [300, 400, 500],
        "b": [400, 500, 600],
        "c": [400, 500, 600],
        "d": [500, 600, 700],
        "e": [300, 400, 500],
    }
    assert winners(made.document, "binder") == ["L0H0", "L0H3", "L0H1", "L0H2", "L0H2"]
    assert roles["role_stability"]["null"]["probability"] < 0.05


def test_last_stage_is_what_has_taken_over():
    """At the last checkpoint the heads that took over are found instead."""
    made = compare(five(), CompareSettings(stage=LAST, null_draws=20))
    assert made.document["roles"]["stage"] == "last"
    assert set(map(tuple, made.document["roles"]["steps"].values())) == {(800,)}
    assert winners(made.document, "binder") == ["L0H3", "L0H0", "L0H1", "L0H2", "L0H2"]


def test_stage_is_told():
    """Findings and page name the stage, and the steps of each run."""
    made = compare(five(), CompareSettings(null_draws=20))
    made.document["findings"] = findings(made.document)
    text = page(made.document)
    assert "the birth of answer_accuracy (≥ 0.9 on validation_iid), the latest that every run has reached" in text
    assert "| at steps | 300, 400, 500 | 400, 500, 600 |" in text
    assert any("causal effects are by ablation" in sentence for sentence in made.document["findings"])


def test_latest_of_several_births():
    """Of births that all runs share, the one with the later median counts; one that a run lacks does not."""
    runs = [
        seed_run(
            name, forms_at=300 if name != "e" else None, births={"w": 200, "heldout_answer_accuracy": 500 + 100 * i}
        )
        for i, name in enumerate("abc")
    ]
    assert choose_stage(runs, "latest_birth", UNPATCHED).name == "heldout_answer_accuracy"
    runs.append(seed_run("d", forms_at=300, births={"w": 400, "heldout_answer_accuracy": None}))
    assert choose_stage(runs, "latest_birth", UNPATCHED).name == "answer_accuracy"
    runs.append(seed_run("e", forms_at=None, births={"w": 400, "heldout_answer_accuracy": None}))
    stage = choose_stage(runs, "latest_birth", UNPATCHED)
    assert (stage.name, stage.steps["e"]) == ("w", [400, 500, 600])


def test_births_without_answers_are_no_stage():
    """A birth of `r` says nothing of answers: without another, roles are compared at the last checkpoint."""
    runs = [seed_run(name, forms_at=None, births={"r": 300}) for name in "ab"]
    stage = choose_stage(runs, "latest_birth", UNPATCHED)
    assert (stage.name, stage.steps) == ("last", {"a": [800], "b": [800]})
    assert choose_stage(runs, "r", UNPATCHED).steps["a"] == [300, 400, 500]


def test_birth_before_the_first_checkpoint_is_no_stage():
    """A birth at the first checkpoint may have come long before, so that the run may be further than the others."""
    runs = [seed_run("a", forms_at=300, births={"w": 200}), seed_run("b", forms_at=300, births={"w": 100})]
    with pytest.raises(
        InputError, match=r"stage: expected one of latest_birth, last, answer_accuracy, for .* w; found w"
    ):
        choose_stage(runs, "w", UNPATCHED)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("answer_accuracy", r"for b has not come from below to the birth of answer_accuracy"),
        ("sunrise", r"stage: expected one of latest_birth, last, w; found sunrise"),
    ],
)
def test_stage_that_some_run_lacks(asked, message):
    """A stage that a run has not reached, or that no run knows, is refused with those that can be had."""
    runs = [seed_run("a", forms_at=300, births={"w": 200}), seed_run("b", forms_at=None, births={"w": 200})]
    with pytest.raises(InputError, match=message):
        choose_stage(runs, asked, UNPATCHED)


def test_patching_decides_where_all_runs_have_it(tmp_path):
    """With recoveries of every role in every run, winners are by patching and not by ablation."""
    runs = [
        seed_run(name, forms_at=300, binder=0, patching=[patched_at(tmp_path, name, (300, 400), binder=2)])
        for name in "ab"
    ]
    for one in runs:  # both heads attend as a binder; ablation names head 0, patching head 2
        one.results.metrics["head_binding_attention"][:, :, 0, 2] = 0.9
    made = compare(runs, CompareSettings(null_draws=20))
    roles = made.document["roles"]
    assert (roles["evidence"], roles["steps"]["a"]) == ("interventions", [300, 400])
    assert winners(made.document, "binder") == ["L0H2", "L0H2"]
    scores = made.dataset["role_stage_score"].sel(run="a", role="binder")
    assert float(scores.sel(component="L0H2")) == pytest.approx(0.9)
    assert float(made.dataset["role_score"].sel(run="a", role="binder", component="L0H0", step=300)) > 0.3


def test_earlier_stage_with_patching_comes_first(tmp_path):
    """If the latest birth is not patched in some run, an earlier one that is patched in all takes its place."""
    runs = [
        seed_run("a", forms_at=500, births={"w": 200}, patching=[patched_at(tmp_path, "a", (200, 500), binder=0)]),
        seed_run("b", forms_at=600, births={"w": 300}, patching=[patched_at(tmp_path, "b", (300,), binder=0)]),
    ]
    document = compare(runs, CompareSettings(null_draws=20)).document
    assert (document["roles"]["stage"], document["roles"]["evidence"]) == ("w", "interventions")
    assert document["roles"]["stage_reason"].endswith("the latest at which every run is patched")
    (note,) = [note for note in document["notes"] if note.startswith("roles")]
    assert "not compared at the later birth of answer_accuracy" in note
    assert "kvjax intervene --run_dirs=runs/b --steps=600,700,800 --kinds=activation_patching" in note


def test_what_is_left_to_patch(tmp_path):
    """Runs patched at no checkpoint of the latest common birth are to be patched at those that it rests on."""
    runs = [
        seed_run("a", forms_at=500, births={"w": 200}, patching=[patched_at(tmp_path, "a", (200, 500), binder=0)]),
        seed_run("b", forms_at=600, births={"w": 300}, patching=[patched_at(tmp_path, "b", (300,), binder=0)]),
    ]
    assert unpatched(runs) == {"b": [600, 700, 800]}
    assert unpatched([seed_run(name, forms_at=None, births={"r": 300}) for name in "ab"]) == {}


def test_run_without_patching(tmp_path):
    """If one run lacks patching, all are scored by ablation, and the note says which run."""
    runs = [
        seed_run("a", forms_at=300, patching=[patched_at(tmp_path, "a", (300,), binder=3)]),
        seed_run("b", forms_at=300),
    ]
    document = compare(runs, CompareSettings(null_draws=20)).document
    assert document["roles"]["evidence"] == "ablation"
    assert winners(document, "binder") == ["L0H0", "L0H0"]
    assert any("rest on ablations" in note and "not patched: b" in note for note in document["notes"])


def test_patching_whose_clean_run_fails(tmp_path):
    """A run that answers swapped streams no better than chance has no binder, whatever ablation says."""
    runs = [
        seed_run(name, forms_at=300, patching=[patched_at(tmp_path, name, (300,), binder=2, failing=("swap",))])
        for name in "ab"
    ]
    document = compare(runs, CompareSettings(null_draws=20)).document
    assert document["roles"]["evidence"] == "interventions"
    assert winners(document, "binder") == [None, None]
    assert winners(document, "writer") == ["L1H0", "L1H0"]


def test_runs_that_nobody_patched():
    """Where no run was patched, as in a comparison of sweeps alone, there is nothing to note."""
    assert not compare(five(), CompareSettings(null_draws=20)).document["notes"]
