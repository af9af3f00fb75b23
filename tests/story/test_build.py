"""The story of a run that is like the reference run, from its numbers to its words."""

import numpy as np
import pytest

from kvjax.errors import InputError
from kvjax.story.build import build_story
from kvjax.story.text import story_lines, story_markdown, summary_lines
from tests.helpers.story import ACCURACY, LOST, STEPS, WINDOWS, reference_like_events, results_of, window


@pytest.fixture(scope="module")
def story():
    """The story of the reference-like run."""
    return build_story(results_of(reference_like_events()))


def test_first_phase(story):
    """The first phase tells what formed, that one head carries it, and that its range is short."""
    first = story.phases[0]
    assert first.between == (1500, 2000) and first.windows == [1750] and first.steps == [1500, 1750, 2000]
    assert first.carriers_before == [] and [one.component for one in first.carriers] == ["L0H0"]
    assert first.carriers[0].share > 0.9 and first.carriers[0].drop_interval[0] > 0
    accuracy = first.accuracy["validation_iid"]
    assert accuracy.before == 0.0 and accuracy.holds and 0.35 < accuracy.change < 0.55, "0.44 was planted"
    assert not first.accuracy["heldout_pairs"].holds
    reach = first.reach["validation_iid"]
    assert (reach.before, reach.after, reach.longest) == (None, 9, 15)


def test_handover_of_a_run(story):
    """One handover is found, from the first head to the two that carry the content."""
    (found,) = story.handovers
    assert found.from_components == ["L0H0"] and sorted(found.to_components) == ["L0H3", "L1H2"]
    assert found.between == (3000, 4000) and found.windows == (1750, 4000)
    assert found.measured_at == (1750, 6000) and found.level == "head"
    assert found.accuracy["heldout_pairs"].interval[0] > 0.5
    assert (found.reach["validation_iid"].before, found.reach["validation_iid"].after) == (9, 15)
    assert not found.persisted, "two further checkpoints after step 4000 do not exist"
    assert all(one.interval == (3000, 4000) for one in found.movements)


def test_carriers_by_two_kinds(story):
    """The kind that content is ranked by leaves out a head that zero ablation would name."""
    last = story.phases[1]
    assert story.ablation == "role_mean"
    assert "L1H3" in last.carriers_by_zero and "L1H3" not in {one.component for one in last.carriers}
    grows = {one.component: one.drop.change > 0 for one in last.components}
    assert grows["L0H3"] and grows["L1H2"] and not grows["L0H0"]
    assert [one.component for one in last.mlps] == ["L0.mlp"]


def test_shares_of_every_component(story):
    """Shares by both kinds of ablation exist for every head, MLP and step; they are null if no drop is positive."""
    for kind in ("zero", "role_mean"):
        rows = {row.component: row for row in story.shares[kind]}
        assert len(rows) == 8 + 2 and all(len(row.share) == len(STEPS) for row in rows.values())
        assert rows["L0H0"].share[:3] == [None] * 3 and rows["L0H0"].low[3] < rows["L0H0"].share[3]
        heads = [rows[name].share[-1] for name in rows if ".mlp" not in name]
        assert sum(max(share, 0) for share in heads) == pytest.approx(1.0, abs=1e-5)


def test_text_of_a_story(story):
    """The printed story needs no other file: what formed, who carried it, its range, who took over, and how sure."""
    text = story_markdown(story)
    short = summary_lines(story)
    assert short[0].startswith("Steps 1500 to 2000: the model begins to answer. L0H0 carries the answers.")
    assert "Values are found up to 9 tokens back, not the 15 measured." in short[0]
    handover = next(line for line in short if line.startswith("Between"))
    assert handover.startswith("Between steps 3000 and 4000 L0H0 hands over to L0H3 and L1H2 (provisional).")
    assert "Accuracy on heldout_pairs: 0.00 to 0.7" in handover
    assert "Zero ablation would also name L1H3" in text
    assert "between checkpoints 3000 and 4000" in text
    assert "The run is unfinished: step 6000 of 16000." in text
    assert "Guessing a value gives 0.008." in text
    assert "None" not in text and "nan" not in text
    assert story_lines(story)[0] == "What happened in reference_like (seed 7)"


def test_determinism_of_a_story(story):
    """Told again from the same files it is the same, word for word."""
    again = build_story(results_of(reference_like_events()))
    assert again == story and story_markdown(again) == story_markdown(story)


def test_answers_at_chance():
    """Answers at chance have no carriers: neither shares nor phases are told, and the text says so."""
    guesses = {split: ((0.008,) * 4,) * len(STEPS) for split in ACCURACY}
    story = build_story(results_of(reference_like_events(accuracy=guesses)))
    assert story.phases == [] and story.handovers == [] and len(story.untold) == 2
    assert all(share is None for row in story.shares["zero"] for share in row.share)
    text = story_markdown(story)
    assert "Not told: the window around step 1750; no accuracy" in text
    assert "Accuracy on validation_iid: " in text


@pytest.mark.parametrize(
    ("verdict", "steps", "says"),
    [("no transition", STEPS, "Nothing formed: why."), ("undecidable", STEPS[-1:], "cannot be decided: why.")],
)
def test_run_without_windows(verdict, steps, says):
    """A run without windows gets a story that says so, and the accuracy it has."""
    chosen = [STEPS.index(step) for step in steps]
    events = reference_like_events().isel(step=chosen)
    flat = events.isel(step=[-1] * len(chosen)).assign_coords(step=list(steps))
    story = build_story(results_of(flat, windows=(), verdict=verdict, reason="why"))
    assert story.phases == [] and story.handovers == []
    text = story_markdown(story)
    assert says in text and "Accuracy on validation_iid" in text


def test_window_in_which_nothing_holds():
    """A window across which no change is beyond its interval is no phase; the story names it."""
    events = reference_like_events()
    still = events.isel(step=[0, 1, 2, 4, 4, 4, 6, 7]).assign_coords(step=list(STEPS))
    story = build_story(results_of(still, windows=(window(1750, 2000, 3000), WINDOWS[1])))
    assert [phase.windows for phase in story.phases] == [[4000]]
    assert story.untold[0].startswith("the window around step 2000; no accuracy")


def test_sweep_without_role_means():
    """A sweep that measured zero ablation alone has a story by that."""
    events = reference_like_events(lost={"zero": LOST["zero"]})
    story = build_story(results_of(events))
    assert story.ablation == "zero" and set(story.shares) == {"zero"}
    assert "Zero ablation would also name" not in story_markdown(story)


def test_checkpoints_that_are_left_out():
    """Copies are left out of a story, and nothing is handed over across a jump."""
    jump = {"kind": "jump", "before": 3000, "after": 4000, "reason": "step 4000 is of another run"}
    story = build_story(results_of(reference_like_events(), breaks=[jump]))
    assert story.handovers == [] and "Note: step 4000 is of another run." in story_markdown(story)
    copy = {"kind": "copy", "before": 250, "after": 1000, "reason": "step 1000 is a copy of step 250"}
    story = build_story(results_of(reference_like_events(), breaks=[copy]))
    assert 1000 not in story.steps and len(story.handovers) == 1


def test_windows_with_settings_of_another_version():
    """Windows found with settings that this version does not have are refused with the remedy."""
    refusal = r"birth_windows.json: expected .*\(run kvjax birth-windows again\); found no field"
    with pytest.raises(InputError, match=refusal):
        build_story(results_of(reference_like_events(), config={"resamples": 500}))


def test_fall_of_accuracy():
    """The story of a run that forgets says so."""
    backwards = reference_like_events().isel(step=[7, 7, 7, 7, 7, 0, 0, 0]).assign_coords(step=list(STEPS))
    story = build_story(results_of(backwards, windows=(window(2000, 3000, 4000),)))
    (phase,) = story.phases
    assert phase.carriers == [] and phase.accuracy["validation_iid"].change < -0.9
    assert "what was learnt is lost" in story_markdown(story)
    assert np.isfinite(phase.accuracy["validation_iid"].interval).all()


def test_run_without_a_seed():
    """A run that records no seed has a story, which says so."""
    results = results_of(reference_like_events())
    results.run.config.seed = None
    assert story_lines(build_story(results))[0] == "What happened in reference_like (no seed recorded)"
