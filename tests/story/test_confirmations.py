"""What patching confirms of a story, read from hand-made recoveries."""

from types import SimpleNamespace

import numpy as np
import pytest

from kvjax.story.build import build_story
from kvjax.story.confirmations import interventions_of, patched_windows, with_confirmations
from kvjax.story.text import story_markdown
from tests.helpers.story import reference_like_events, results_of, write_patching

PLACES = ("L0H0", "L0H3", "L1H2", "L1.mlp", "layer_0_post_mlp")
# Estimate, low and high of each place, by kind of pair.
RECOVERED = {
    "swap": [(0.02, -0.1, 0.1), (0.98, 0.9, 1.0), (0.05, 0.01, 0.1), (0.3, 0.2, 0.4), (1.0, 1.0, 1.0)],
    "value": [(0.2, -0.1, 0.4), (0.01, -0.1, 0.1), (0.6, 0.5, 0.7), (0.0, -0.1, 0.1), (1.0, 1.0, 1.0)],
    "query": [(np.nan,) * 3] * 5,
    "stale": [(0.9, 0.8, 1.0)] * 5,  # of a clean run that answers at chance
}


@pytest.fixture
def patched_run(tmp_path):
    """The reference-like run, patched at its last two steps."""
    folder = tmp_path / "interventions" / "activation_patching"
    path = write_patching(folder / "window_4000.json", RECOVERED, PLACES, {4000: "a", 6000: "b"}, failing=["stale"])
    results = results_of(reference_like_events())
    results.sweep.checkpoints = [SimpleNamespace(step=step, sha256=x) for step, x in ((4000, "a"), (6000, "b"))]
    results.intervention_files = lambda kind: sorted((tmp_path / "interventions" / kind).glob("*.json"))
    return results, path


def test_confirmations_of_a_phase(patched_run):
    """A component is confirmed for the kinds of pairs whose recovery is a tenth or more, with an interval above 0."""
    results, _ = patched_run
    story = with_confirmations(build_story(results), results)
    assert story.phases[0].confirmations == [], "no step of the first phase was patched"
    found = {(one.kind, one.component): one for one in story.phases[1].confirmations}
    confirmed = {key for key, one in found.items() if one.confirmed}
    assert confirmed == {("swap", "L0H3"), ("swap", "L1.mlp"), ("value", "L1H2")}
    assert found["swap", "L0H3"].recovery == pytest.approx(0.98) and found["swap", "L0H3"].step == 6000
    assert found["query", "L0H3"].recovery is None and found["stale", "L0H3"].recovery is None
    assert {one.component for one in story.handovers[0].confirmations} >= {"L0H0", "L0H3", "L1H2"}
    assert list(story.told_from.interventions) == ["activation_patching/window_4000"]
    assert story.told_from.interventions == interventions_of(results)


def test_words_of_confirmations(patched_run):
    """The text says what is confirmed, what is not, and which kind shows nothing."""
    results, _ = patched_run
    text = story_markdown(with_confirmations(build_story(results), results))
    assert "Patching on swap pairs at step 6000 confirms L0H3 0.98 (0.90 to 1.00), not L1H2 and L0H0." in text
    assert "Patching on value pairs at step 6000 confirms L1H2 0.60 (0.50 to 0.70), not L0H0 and L0H3." in text
    assert "Patching on query and stale pairs at step 6000 shows nothing" in text
    assert "Components were patched as well: activation_patching/window_4000." in text
    assert "rests on ablations alone" not in text


def test_words_without_carriers(patched_run):
    """A phase that no head carries gives what patching finds, or nothing."""
    results, _ = patched_run
    story = with_confirmations(build_story(results), results)
    phase = story.phases[1].model_copy(update={"carriers": [], "carriers_before": []})
    text = story_markdown(story.model_copy(update={"phases": [phase], "handovers": []}))
    assert "Patching on swap pairs at step 6000 finds L0H3 0.98 (0.90 to 1.00)." in text
    nothing = [one.model_copy(update={"confirmed": False}) for one in phase.confirmations]
    text = story_markdown(story.model_copy(update={"phases": [phase.model_copy(update={"confirmations": nothing})]}))
    assert "Patching on swap pairs at step 6000 finds no head." in text


@pytest.mark.parametrize("damage", ["checkpoints", "summary", "arrays", "contents"])
def test_interventions_that_cannot_be_used(patched_run, damage):
    """Patching of other files, or a damaged one, is left out, and a note names it with the remedy."""
    results, path = patched_run
    if damage == "checkpoints":
        results.sweep.checkpoints = [SimpleNamespace(step=4000, sha256="other")]
    elif damage == "summary":
        path.write_text(path.read_text().replace("4000", "4001"))
    elif damage == "arrays":
        path.with_suffix(".nc").write_bytes(b"damaged")
    else:
        path.write_text("[]")
    patched, notes = patched_windows(results)
    assert patched == []
    assert len(notes) == 1 and "activation_patching/window_4000" in notes[0]
    assert notes[0].endswith("run kvjax intervene again")
    story = with_confirmations(build_story(results), results)
    assert story.phases[1].confirmations == [] and f"Note: {notes[0]}." in story_markdown(story)
