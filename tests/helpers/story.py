"""A run made of numbers alone, like the reference run: one head forms first, and two others take over."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import xarray as xr

from kvjax.artifacts.birth_windows_schema import BirthWindows
from kvjax.artifacts.files import FileHash, write_json
from kvjax.artifacts.identity import sealed
from kvjax.artifacts.tables import write_datasets
from kvjax.config.files import find_config, read_config
from kvjax.config.windows import WindowConfig

STEPS = (250, 1000, 1500, 1750, 2000, 3000, 4000, 6000)
DISTANCES = (6, 9, 12, 15)
SEQUENCES = 60

# Accuracy by distance, at every step.
EARLY, MIDDLE, LATE = (0.0, 0.0, 0.0, 0.0), (0.7, 0.9, 0.1, 0.05), (0.95, 1.0, 0.95, 0.9)
ACCURACY = {
    "validation_iid": (EARLY, EARLY, EARLY, MIDDLE, MIDDLE, MIDDLE, LATE, LATE),
    "heldout_pairs": (EARLY,) * 6 + ((0.3,) * 4, (0.7,) * 4),
}
# Share of the streams that are answered no longer without a head, at every step.
_FIRST = (0, 0, 0, 0.9, 0.9, 0.7, 0.1, 0.02)
_BINDER = (0, 0, 0, 0.02, 0.02, 0.05, 0.6, 0.65)
_COPIER = (0, 0, 0, 0.01, 0.01, 0.05, 0.45, 0.45)
_CONSTANT = (0, 0, 0, 0.05, 0.05, 0.2, 0.7, 0.8)
LOST = {
    "role_mean": {(0, 0): _FIRST, (0, 3): _BINDER, (1, 2): _COPIER},
    "zero": {(0, 0): _FIRST, (0, 3): _BINDER, (1, 2): _COPIER, (1, 3): _CONSTANT},
}


def reference_like_events(accuracy=ACCURACY, lost=LOST, steps=STEPS) -> xr.Dataset:
    """Draws right answers, with and without each head and MLP; every stream keeps its luck over the steps."""
    rng = np.random.default_rng(5)
    reads, splits = len(DISTANCES), list(accuracy)
    size = SEQUENCES * len(splits)
    luck = rng.uniform(size=(len(splits), SEQUENCES, reads))
    right = np.stack([np.array(accuracy[split])[:, None, :] > luck[s] for s, split in enumerate(splits)], axis=1)
    right = right.reshape(len(steps), size, reads).astype(np.float32)
    events = xr.Dataset(coords={"step": list(steps)})
    events["is_read"] = (("sequence", "read"), np.ones((size, reads), bool))
    events["split"] = (("sequence",), np.repeat(splits, SEQUENCES))
    events["tokens_since_support"] = (("sequence", "read"), np.broadcast_to(DISTANCES, (size, reads)))
    events["read_correct"] = (("step", "sequence", "read"), right)
    whole = right.sum(axis=2)
    needs = rng.uniform(size=(size, 2, 4))
    for kind, heads in lost.items():
        kept = np.repeat(whole[:, :, None], 8, axis=2).reshape(len(steps), size, 2, 4)
        for (layer, head), shares in heads.items():
            fails = needs[None, :, layer, head] < np.array(shares)[:, None]
            kept[:, :, layer, head] = np.where(fails, 0, whole)
        events[f"head_{kind}_correct"] = (("step", "sequence", "layer", "head"), kept)
        mlps = np.stack([np.zeros_like(whole), whole], axis=2)  # nothing is answered without the first MLP
        events[f"mlp_{kind}_correct"] = (("step", "sequence", "layer"), mlps)
    return events


def window(start: int, center: int, end: int, steps=STEPS, **parts: Any) -> dict[str, Any]:
    """Makes the entry of a window."""
    within = [step for step in steps if start <= step <= end]
    empty = {name: [] for name in ("triggers", "order", "precedes", "components", "rose", "fell")}
    return {"start_step": start, "center_step": center, "end_step": end, "steps": within} | empty | parts


WINDOWS = (window(1500, 1750, 2000), window(3000, 4000, 6000))


def results_of(events: xr.Dataset, windows=WINDOWS, *, verdict="windows", **parts: Any) -> SimpleNamespace:
    """Stands in for the results of a run: the parts of `RunResults` that a story reads."""
    config = read_config(find_config("default", "windows"), WindowConfig)
    steps = events["step"].values.tolist()
    document = {
        "schema_version": 1,
        "run_name": "reference_like",
        "verdict": verdict,
        "reason": f"{len(windows)} windows so far among {len(steps)} checkpoints",
        "complete": False,
        "ranked_by": "role_mean" if "head_role_mean_correct" in events else "zero",
        "measured_on": {"probe_set_sha256": "p", "steps": steps, "checkpoints_sha256": []},
        "config": config.model_dump(mode="json"),
        "births": {},
        "windows": list(windows),
        "breaks": [],
        "content_sha256": "windows",
    } | parts
    found = BirthWindows.model_validate(document)
    run = SimpleNamespace(
        path=Path("runs/reference_like"),
        config=SimpleNamespace(run_name="reference_like", seed=7),
        planned_steps=16000,
        layout=SimpleNamespace(arrays=Path("checkpoint_metrics.nc"), birth_windows=Path("birth_windows.json")),
    )
    metrics = SimpleNamespace(attrs={"num_values": 128})
    return SimpleNamespace(
        windows=found, sweep=SimpleNamespace(breaks=found.breaks), run=run, events=events, metrics=metrics
    )


def write_patching(path: Path, recovered, places, hashes: Mapping[int, str], *, failing: Sequence[str] = ()) -> Path:
    """Writes activation patching with given recoveries at the last step, and none at the others; returns the summary.

    Args:
      path: of the summary.
      recovered: by kind of pair, estimate, low and high of each place.
      places: names of the places.
      hashes: of the checkpoint files, by step.
      failing: kinds of pairs whose clean runs answer at chance.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    last = np.array(list(recovered.values()))  # [kinds, places, 3]
    recovery = np.stack([*[np.zeros_like(last)] * (len(hashes) - 1), last], axis=1)
    dims = ("pair_kind", "step", "place", "statistic", "position_role", "direction", "metric")
    # One role, direction and metric is what a story tells; the others hold something else.
    full = np.full((*recovery.shape, 2, 2, 2), 9.0)
    full[..., 1, 0, 1] = recovery
    coords = {
        "pair_kind": list(recovered),
        "step": list(hashes),
        "place": list(places),
        "statistic": ["estimate", "low", "high"],
        "position_role": ["answer", "all"],
        "direction": ["denoising", "noising"],
        "metric": ["answer_loss", "logit_difference"],
    }
    dataset = xr.Dataset({"recovery_by_role": (dims, full)}, coords=coords)
    fails = dataset["pair_kind"].isin(list(failing)).expand_dims(failure=["not_above_chance"], metric=coords["metric"])
    dataset["clean_run_fails"] = fails.expand_dims(step=coords["step"])
    write_datasets(path.with_suffix(".nc"), [(None, dataset)])
    document = {
        "kind": "activation_patching",
        "steps": list(hashes),
        "measured_on": {"inputs": {"checkpoints": {str(step): sha256 for step, sha256 in hashes.items()}}},
        "arrays": dataclasses.asdict(FileHash.of(path.with_suffix(".nc"))),
    }
    write_json(path, sealed(document))
    return path
