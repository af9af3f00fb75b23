"""Reads from activation patching which components the clean answer comes back through, for each kind of pair."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from kvjax.artifacts.results import Intervention, RunResults
from kvjax.artifacts.story_schema import Confirmation, HandoverEntry, Phase, Story
from kvjax.errors import InputError

KIND = "activation_patching"

# A component is confirmed if patching it recovers this part of the gap or more, and its interval lies above 0.
_CONFIRMED = 0.1
# The metric whose recoveries a story gives, if several are stored.
_METRIC = "logit_difference"


def patched_windows(results: RunResults) -> tuple[list[xr.DataArray], list[str]]:
    """Opens the activation patching of a run that is of the checkpoint files its sweep measured.

    Returns:
      The recoveries that can be used, by statistic, pair_kind, step and place; and a note on each that cannot.
    """
    measured = {str(checkpoint.step): checkpoint.sha256 for checkpoint in results.sweep.checkpoints}
    found, notes = [], []
    for path in results.intervention_files(KIND):
        name = f"{KIND}/{path.stem}"
        try:
            one = Intervention.open(path)
            if not _hashes(one).items() <= measured.items():
                notes.append(f"{name} is of other checkpoint files than the sweep: run kvjax intervene again")
                continue
            found.append(_recovery(one.dataset))
        except (InputError, KeyError) as error:
            reason = str(error) if isinstance(error, InputError) else f"it lacks {error}"
            notes.append(f"{name} cannot be used ({reason}): run kvjax intervene again")
    return found, notes


def interventions_of(results: RunResults) -> dict[str, str]:
    """Maps each activation patching that a story can use to the hash of its arrays; reads none."""
    measured = {str(checkpoint.step): checkpoint.sha256 for checkpoint in results.sweep.checkpoints}
    found = {}
    for path in results.intervention_files(KIND):
        try:
            one = Intervention.open(path)
        except InputError:
            continue
        if _hashes(one).items() <= measured.items():
            # Of the arrays: the summary is another once another metric is asked for.
            found[f"{KIND}/{path.stem}"] = one.document["arrays"]["sha256"]
    return found


def with_confirmations(story: Story, results: RunResults) -> Story:
    """Adds to each phase and handover what patching recovers at its latest patched step, if any was measured."""
    patched, notes = patched_windows(results)

    def phase(one: Phase) -> Phase:
        named = [carrier.component for carrier in (*one.carriers, *one.carriers_before)]
        return one.model_copy(update={"confirmations": _confirmations(patched, one.steps, named)})

    def handover(one: HandoverEntry) -> HandoverEntry:
        steps = [step for step in story.steps if one.between[0] <= step <= one.measured_at[1]]
        named = [*one.to_components, *one.from_components]
        return one.model_copy(update={"confirmations": _confirmations(patched, steps, named)})

    return story.model_copy(
        update={
            "phases": [phase(one) for one in story.phases],
            "handovers": [handover(one) for one in story.handovers],
            "notes": [*story.notes, *notes],
            "told_from": story.told_from.model_copy(update={"interventions": interventions_of(results)}),
        }
    )


def _confirmations(patched: Sequence[xr.DataArray], steps: Sequence[int], named: Sequence[str]) -> list[Confirmation]:
    """Lists recoveries at the latest of some steps that was patched: of the named components, and of all confirmed."""
    at = [(step, one) for one in patched for step in one["step"].values.tolist() if step in steps]
    if not at:
        return []
    step, latest = max(at, key=lambda found: found[0])
    recovery = latest.sel(step=step).transpose("pair_kind", "place", "statistic")
    places = recovery["place"].values.tolist()
    components = [place for place in places if place.startswith("L")]
    listed = []
    for k, kind in enumerate(recovery["pair_kind"].values.tolist()):
        found = []
        for name in components:
            value, low, high = (float(x) for x in recovery.values[k, places.index(name)])
            confirmed = value >= _CONFIRMED and low > 0
            if name not in named and not confirmed:
                continue
            interval = (low, high) if np.isfinite(low) and np.isfinite(high) else None
            known = value if np.isfinite(value) else None
            found.append(
                Confirmation(
                    component=name, kind=kind, step=step, recovery=known, interval=interval, confirmed=confirmed
                )
            )
        listed += sorted(found, key=lambda one: -np.inf if one.recovery is None else one.recovery, reverse=True)
    return listed


def _hashes(one: Intervention) -> dict[str, str]:
    """Reads the hashes of the checkpoint files that a summary was measured on, by step."""
    inputs = one.document["measured_on"].get("inputs", {}) if isinstance(one.document["measured_on"], dict) else {}
    hashes = inputs.get("checkpoints") if isinstance(inputs, dict) else None
    return hashes if isinstance(hashes, dict) else {"": "unknown"}


def _recovery(dataset: xr.Dataset) -> xr.DataArray:
    """Selects the recoveries that a story gives; NaN for kinds of pair whose clean run fails, which recover nothing."""
    recovery = dataset["recovery_by_role"].sel(position_role="all", direction="denoising", metric=_METRIC)
    return recovery.where(~dataset["clean_run_fails"].sel(metric=_METRIC).any("failure"))
