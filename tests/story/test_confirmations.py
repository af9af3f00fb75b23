"""What patching confirms of a story, read from hand-made recoveries."""

from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from kvjax.artifacts.files import FileHash, write_json
from kvjax.artifacts.identity import sealed
from kvjax.artifacts.tables import write_datasets
from kvjax.story.build import build_story
from kvjax.story.confirmations import interventions_of, patched_windows, with_confirmations
from kvjax.story.text import story_markdown
from tests.helpers.story import reference_like_events, results_of

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
    folder.mkdir(parents=True)
    values = np.array([list(of_kind) for of_kind in RECOVERED.values()])  # [kinds, places, 3]
    recovery = np.stack([values, values], axis=1)  # and steps
    recovery[:, 0] = 0.0  # at the earlier step nothing
    dims = ("pair_kind", "step", "place", "statistic", "position_role", "direction", "metric")
    # Only one role, direction and metric is told; the others hold something else.
    full = np.full((*recovery.shape, 2, 2, 2), 9.0)
    full[..., 1, 0, 1] = recovery
    coords = {
        "pair_kind": list(RECOVERED),
        "step": [4000, 6000],
        "place": list(PLACES),
        "statistic": ["estimate", "low", "high"],
        "position_role": ["answer", "all"],
        "direction": ["denoising", "noising"],
        "metric": ["answer_loss", "logit_difference"],
    }
    path = folder / "window_4000.json"
    dataset = xr.Dataset({"recovery_by_role": (dims, full)}, coords=coords)
    failing = (dataset["pair_kind"] == "stale").expand_dims(failure=["not_above_chance"], metric=coords["metric"])
    dataset["clean_run_fails"] = failing.expand_dims(step=coords["step"])
    write_datasets(path.with_suffix(".nc"), [(None, dataset)])
    arrays = FileHash.of(path.with_suffix(".nc"))
    document = {
        "kind": "activation_patching",
        "steps": [4000, 6000],
        "measured_on": {"inputs": {"checkpoints": {"4000": "a", "6000": "b"}}},
        "arrays": {"sha256": arrays.sha256, "bytes": arrays.bytes},
    }
    write_json(path, sealed(document))
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
    assert "Patching on query pairs at step 6000 shows nothing" in text
    assert "Components were patched as well: activation_patching/window_4000." in text
    assert "rests on ablations alone" not in text


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
