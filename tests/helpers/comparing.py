"""Seeds made of numbers alone: runs in which a lookup forms, carried by heads at addresses that differ."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import xarray as xr

from kvjax.artifacts.birth_windows_schema import BirthWindows
from kvjax.compare.aligned import SweptRun
from tests.helpers.story import window

LAYERS, HEADS = 2, 4
SPLITS = ("all", "validation_iid", "heldout_pairs")
STEPS = (100, 200, 300, 400, 500, 600, 700, 800)


def seed_run(
    name: str,
    *,
    forms_at: int | None,
    binder: int = 0,
    retriever: int = 0,
    steps: tuple[int, ...] = STEPS,
    planned_steps: int = 800,
    probe_set: str = "p",
    d_model: int = 8,
    final: float = 0.95,
) -> SweptRun:
    """Makes a run whose accuracy rises at a step, and whose roles two heads carry from then on.

    Args:
      name: of the run; its seed is drawn from it.
      forms_at: the first step at which it answers; None if it never does.
      binder, retriever: heads of layer 0 and layer 1 that carry the roles.
      steps, planned_steps, probe_set, d_model: of the run.
      final: its accuracy once formed.
    """
    generator = np.random.default_rng(sum(map(ord, name)))
    formed = np.array([forms_at is not None and step >= forms_at for step in steps])
    accuracy = np.where(formed, final, 0.02)[:, None] * np.array([1.0, 1.0, 0.9])
    metrics = xr.Dataset(coords={"step": list(steps), "split": list(SPLITS), "ablation": ["zero", "role_mean"]})
    metrics["answer_accuracy"] = (("step", "split"), accuracy, {"units": "1", "long_name": "accuracy"})
    shape = (len(steps), len(SPLITS), LAYERS, HEADS)
    dims = ("step", "split", "layer", "head")
    for measure, layer, head in (
        ("head_binding_attention", 0, binder),
        ("head_current_value_attention", 1, retriever),
        ("head_direct_logit_attribution", 1, retriever),
    ):
        values = generator.uniform(0.0, 0.1, shape)
        values[formed, :, layer, head] = 0.9
        metrics[measure] = (dims, values, {"units": "1"})
    metrics["mlp_direct_logit_attribution"] = (dims[:-1], np.zeros(shape[:-1]))
    drops = generator.uniform(0.0, 0.01, (len(steps), 2, *shape[1:]))
    drops[formed, :, :, 0, binder], drops[formed, :, :, 1, retriever] = 0.5, 0.6
    metrics["head_accuracy_drop"] = (("step", "ablation", *dims[1:]), drops, {"units": "1"})
    metrics["mlp_accuracy_drop"] = (("step", "ablation", *dims[1:-1]), drops[..., 0])
    ends = np.stack([accuracy, accuracy - 0.02, accuracy + 0.02])
    intervals = xr.Dataset(
        {"answer_accuracy": (("statistic", "step", "split"), ends)},
        coords={"statistic": ["estimate", "low", "high"], "step": list(steps), "split": list(SPLITS)},
    )
    config = SimpleNamespace(
        run_name=name,
        seed=len(name),
        model=SimpleNamespace(model_dump=lambda include: {"d_model": d_model, "n_layers": LAYERS, "n_heads": HEADS}),
    )
    run = SimpleNamespace(
        path=Path("runs") / name,
        config=config,
        planned_steps=planned_steps,
        complete=steps[-1] >= planned_steps,
        layout=SimpleNamespace(config=Path("runs") / name / "run_config.json", sweep=Path("sweep.json")),
    )
    sweep = SimpleNamespace(
        ranked_by="role_mean",
        probe_set=SimpleNamespace(content_sha256=probe_set),
        measured_on=SimpleNamespace(sweep_sha256=f"sweep of {name}"),
    )
    windows, order = [], []
    if forms_at is not None:
        at = list(steps).index(forms_at)
        order = [_moved("r", steps[at - 2 : at]), _moved("answer_accuracy", steps[at - 1 : at + 1])]
        windows = [window(steps[at - 1], forms_at, steps[min(at + 1, len(steps) - 1)], steps=steps, order=order)]
    story = SimpleNamespace(
        model_dump=lambda **_: {
            "phases": [{"between": [w["start_step"], w["end_step"]], "carriers": []} for w in windows],
            "handovers": [],
        },
        content_sha256=f"story of {name}",
    )
    results = SimpleNamespace(
        run=run,
        metrics=metrics,
        intervals=intervals,
        sweep=sweep,
        windows=_windows(steps, windows, forms_at),
        rows=[{"step": s, "stabilized": {"heads": bool(f)}} for s, f in zip(steps, formed, strict=True)],
        story=story,
        intervention_files=lambda kind=None: [],
    )
    return SweptRun(name, results)


def _moved(metric: str, between: tuple[int, ...]) -> dict[str, Any]:
    middle = float(np.mean(between))
    times = {"onset": float(between[0]), "midpoint": middle, "completion": float(between[1])}
    observed = {key: list(between) for key in ("interval", "onset_interval", "completion_interval", "between")}
    return {"metric": metric, "split": "validation_iid", "direction": "rise", **times, **observed}


def _windows(steps: tuple[int, ...], windows: list[dict[str, Any]], forms_at: int | None) -> BirthWindows:
    born = {
        "split": "validation_iid",
        "threshold": 0.9,
        "step": forms_at,
        "interval": None,
        "censored": forms_at is None,
        "left_censored": False,
        "half_rise_step": forms_at,
        "half_rise_interval": None,
        "reason": "made by hand",
    }
    document = {
        "schema_version": 1,
        "run_name": "made by hand",
        "verdict": "windows" if windows else "no transition",
        "reason": "made by hand",
        "complete": True,
        "ranked_by": "role_mean",
        "measured_on": {"probe_set_sha256": "p", "steps": list(steps), "checkpoints_sha256": []},
        "config": {},
        "births": {"answer_accuracy": born},
        "windows": windows,
        "breaks": [],
    }
    return BirthWindows.model_validate(document)
