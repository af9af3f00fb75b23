"""When metrics first moved in each run: between two checkpoints, not by the end, or at a time that none can date."""

from __future__ import annotations

import pytest

from kvjax.compare.events import births, onsets, unlike_births
from kvjax.compare.order import Onset, precedences
from kvjax.compare.seeds import compare
from kvjax.compare.settings import CompareSettings
from tests.helpers.comparing import STEPS, seed_run

LAST = STEPS[-1]


def run(name, *, r="dated"):
    """Makes a run in which `r` moves from 100 to 200 and accuracy from 200 to 300; `r` may be undated, or not move."""
    one = seed_run(name, forms_at=300)
    order = one.results.windows.windows[0].order
    order[:1] = {"dated": order[:1], "undated": [order[0].model_copy(update={"between": None})], "still": []}[r]
    return one


def test_dated_onsets():
    """Each is dated by the two checkpoints of its midpoint; a metric that stays has not moved by the end."""
    found = onsets([run("a"), run("b", r="still")])
    assert found["r"] == [Onset(100, 200), Onset(LAST, None)]
    assert found["answer_accuracy"] == [Onset(200, 300)] * 2


def test_undated_onset_is_no_late_one():
    """A window that cannot date `r` bounds it: the pair with accuracy, which it dates, cannot be told in that run."""
    found = onsets([run("a"), run("b", r="undated")])
    assert found["r"] == [Onset(100, 200), Onset(200, 400)]
    (pair,) = precedences(found)
    assert (pair.first, pair.before, pair.after, pair.undetermined) == ("r", 1, 0, 1)


def test_growth_and_births_are_movements():
    """Steady growth, which no window lists, and a birth outside windows say by when a metric has moved."""
    ramp = {"kind": "measure", "metric": "r", "split": "validation_iid", "start_step": 100, "end_step": 800}
    grown = run("b", r="still")
    document = grown.results.windows.model_dump(mode="json", by_alias=True)
    document["ramps"] = [ramp | {"before": 0.1, "after": 0.9, "score": 9.0}]
    grown.results.windows = type(grown.results.windows).model_validate(document)
    born = run("c", r="still")
    born.results.windows.births["r"] = seed_run("d", forms_at=300, births={"r": 700}).results.windows.births["r"]
    assert onsets([run("a"), grown, born])["r"] == [Onset(100, 200), Onset(100, 800), Onset(0, 700)]


def test_movement_before_the_dated_one():
    """What was born before the movement that a window dates had moved by then, and so before what came later."""
    early, later = (seed_run(name, forms_at=500, births={"r": step}) for name, step in (("a", 200), ("b", 600)))
    assert [one.results.windows.windows[0].order[0].between for one in (early, later)] == [(300, 400)] * 2
    found = onsets([early, later])
    assert found["r"] == [Onset(0, 200), Onset(300, 400)]
    (pair,) = precedences(found)
    assert (pair.first, pair.before) == ("r", 2)


def test_metric_past_its_threshold_from_the_start():
    """A birth at the first checkpoint may be chance: of this metric the run tells nothing."""
    found = onsets([run("a"), seed_run("b", forms_at=300, births={"r": STEPS[0]})])
    assert found["r"] == [Onset(100, 200), None]


def test_births_at_other_thresholds():
    """A birth of 0.2 and one of 0.9 are not one event: the metric is left out, and a note says why."""
    runs = [seed_run(name, forms_at=300, births={"r": 200, "w": 300}) for name in "abcd"]
    own = runs[1].results.windows.births
    own["r"] = own["r"].model_copy(update={"threshold": 0.9})
    assert unlike_births(runs) == {"r": ["0.2 on validation_iid", "0.9 on validation_iid"]}
    assert set(births(runs)) == {"answer_accuracy", "w"}
    note = (
        "births of r are left out: their thresholds differ between runs (0.2 on validation_iid, 0.9 on validation_iid)"
    )
    assert note in compare(runs, CompareSettings(null_draws=20)).document["notes"]


@pytest.mark.parametrize("births_of", [{}, {"r": None}])
def test_birth_that_did_not_come(births_of):
    """A metric that is never born and never moves is censored, not unknown."""
    assert onsets([run("a"), seed_run("b", forms_at=None, births=births_of)])["r"][1] == Onset(LAST, None)
