"""Seeds made of numbers alone: runs in which a lookup forms, carried by heads at addresses that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import xarray as xr

from kvjax.artifacts.birth_windows_schema import BirthWindows
from kvjax.compare.aligned import SweptRun
from kvjax.config.files import find_config, read_config
from kvjax.config.windows import WindowConfig
from tests.helpers.story import window

LAYERS, HEADS = 2, 4
SPLITS = ("all", "validation_iid", "heldout_pairs")
STEPS = (100, 200, 300, 400, 500, 600, 700, 800)


def seed_run(
    name: str,
    *,
    forms_at: int | None,
    births: Mapping[str, int | None] = MappingProxyType({}),
    unconfirmed_from: int | None = None,
    handed_over: tuple[int, int, int] | None = None,
    patching: Sequence[Path] = (),
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
      forms_at: the first step at which it answers, and is born; None if it never does.
      births: further births, by metric; None for one that does not come.
      unconfirmed_from: the step from which on accuracy is at its threshold, too late to count.
      binder, retriever: heads of layer 0 and layer 1 that carry the roles.
      handed_over: a step, and the heads of layer 0 and layer 1 that carry the roles from then on.
      patching: files of activation patching.
      steps, planned_steps, probe_set, d_model: of the run.
      final: its accuracy once formed.
    """
    generator = np.random.default_rng(sum(map(ord, name)))
    formed = np.array([forms_at is not None and step >= forms_at for step in steps])
    later = np.array([handed_over is not None and step >= handed_over[0] for step in steps])
    accuracy = np.where(formed, final, 0.02)[:, None] * np.array([1.0, 1.0, 0.9])
    metrics = xr.Dataset(coords={"step": list(steps), "split": list(SPLITS), "ablation": ["zero", "role_mean"]})
    metrics["answer_accuracy"] = (("step", "split"), accuracy, {"units": "1", "long_name": "accuracy"})
    metrics["read_count"] = (("split",), np.full(len(SPLITS), 600.0))
    shape = (len(steps), len(SPLITS), LAYERS, HEADS)
    dims = ("step", "split", "layer", "head")
    for measure, layer, head in (
        ("head_binding_attention", 0, binder),
        ("head_current_value_attention", 1, retriever),
        ("head_direct_logit_attribution", 1, retriever),
    ):
        values = generator.uniform(0.0, 0.1, shape)
        values[formed, :, layer, head] = 0.9
        if later.any():
            values[later, :, layer, head] = 0.05
            values[later, :, layer, handed_over[1 + layer]] = 0.9
        metrics[measure] = (dims, values, {"units": "1"})
    metrics["mlp_direct_logit_attribution"] = (dims[:-1], np.zeros(shape[:-1]))
    drops = generator.uniform(0.0, 0.01, (len(steps), 2, *shape[1:]))
    drops[formed, :, :, 0, binder], drops[formed, :, :, 1, retriever] = 0.5, 0.6
    if later.any():
        drops[later, :, :, 0, binder], drops[later, :, :, 1, retriever] = 0.005, 0.005
        drops[later, :, :, 0, handed_over[1]], drops[later, :, :, 1, handed_over[2]] = 0.5, 0.6
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
        checkpoints=[SimpleNamespace(step=step, sha256="a") for step in steps],
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
        windows=_windows(steps, windows, {"answer_accuracy": forms_at, **births}, unconfirmed_from),
        rows=[{"step": s, "stabilized": {"heads": bool(f)}} for s, f in zip(steps, formed, strict=True)],
        story=story,
        intervention_files=lambda kind=None: list(patching),
    )
    return SweptRun(name, results)


def _moved(metric: str, between: tuple[int, ...]) -> dict[str, Any]:
    middle = float(np.mean(between))
    times = {"onset": float(between[0]), "midpoint": middle, "completion": float(between[1])}
    observed = {key: list(between) for key in ("interval", "onset_interval", "completion_interval", "between")}
    return {"metric": metric, "split": "validation_iid", "direction": "rise", **times, **observed}


def _birth(name: str, step: int | None, unconfirmed: int | None) -> dict[str, Any]:
    return {
        "split": "heldout_pairs" if name.startswith("heldout") else "validation_iid",
        "threshold": {"answer_accuracy": 0.9, "heldout_answer_accuracy": 0.5, "w": 1.0, "r": 0.2}[name],
        "step": step,
        "interval": None,
        "censored": step is None,
        "unconfirmed_step": unconfirmed,
        "left_censored": step == STEPS[0],
        "half_rise_step": step,
        "half_rise_interval": None,
        "reason": "made by hand",
    }


def _windows(
    steps: tuple[int, ...],
    windows: list[dict[str, Any]],
    births: Mapping[str, int | None],
    unconfirmed_from: int | None,
) -> BirthWindows:
    born = {
        name: _birth(name, step, unconfirmed_from if name == "answer_accuracy" else None)
        for name, step in births.items()
    }
    document = {
        "schema_version": 1,
        "run_name": "made by hand",
        "verdict": "windows" if windows else "no transition",
        "reason": "made by hand",
        "complete": True,
        "ranked_by": "role_mean",
        "measured_on": {"probe_set_sha256": "p", "steps": list(steps), "checkpoints_sha256": []},
        "config": read_config(find_config("default", "windows"), WindowConfig).model_dump(mode="json"),
        "births": born,
        "windows": windows,
        "breaks": [],
    }
    return BirthWindows.model_validate(document)
