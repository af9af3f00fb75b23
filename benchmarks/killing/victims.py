"""The commands that get killed: what each starts from, how it is called, and which numbers have to be the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.artifacts.files import read_json, read_json_lines
from kvjax.artifacts.layout import RunLayout

BENCHMARK, RUN, STUDY = "benchmark", "run", "study"
_SWEEP = ("--ablations=zero", "--probe=none")


@dataclasses.dataclass(frozen=True)
class Victim:
    """A command to kill.

    Attributes:
      needs: the victim whose undisturbed result it works on; None if it starts from configs.
      arguments: from the folder to the command's arguments, of the first call and of those that go on.
      numbers: from the folder to everything that has to come out the same.
    """

    needs: str | None
    arguments: Callable[[Path], list[str]]
    numbers: Callable[[Path], dict[str, Any]]


def _train(folder: Path) -> list[str]:
    layout = RunLayout(folder / RUN)
    more = ["--resume"] if layout.step_checkpoints() else ["--overwrite"] if layout.config.is_file() else []
    return ["train", f"--config={folder / 'train.json'}", f"--output_dir={folder / RUN}", *more]


def _trained(folder: Path) -> dict[str, Any]:
    """Collects the parameters, the optimizer's moments, the log and the best checkpoint of a run."""
    import torch

    layout, found = RunLayout(folder / RUN), {}
    for step, path in sorted(layout.step_checkpoints()):
        document = torch.load(path, weights_only=True)
        found[f"step {step}"] = {name: tensor.numpy() for name, tensor in document["model_state"].items()}
        for number, moments in document["optimizer_state"]["state"].items():
            found[f"step {step} {number}"] = {name: tensor.numpy() for name, tensor in moments.items()}
    rows = read_json_lines(layout.metrics)
    found["log"] = [row for row in rows if row["phase"] != "resume"]
    best = read_json(layout.best_record)
    return found | {"best": {name: value for name, value in best.items() if name != "path"}}


def _swept(folder: Path) -> dict[str, Any]:
    from kvjax.artifacts.results import open_results

    results = open_results(folder / RUN)
    found = {"rows": results.rows, "heads": results.heads, "mlps": results.mlps}
    for group in ("metrics", "intervals", "events"):
        found[group] = _variables(getattr(results, group))
    return found | _converted(folder)


def _converted(folder: Path) -> dict[str, Any]:
    import jax
    from kvjax.converters.parameter_store import read_stored_run

    store = RunLayout(folder / RUN).converted
    named = {one["part"] for one in read_json(store / "manifest.json")["checkpoints"]}
    found: dict[str, Any] = {"parts that nothing names": sorted({p.name for p in store.glob("part_*")} - named)}
    for stored in read_stored_run(store):
        leaves = jax.tree_util.tree_leaves_with_path(stored.params)
        found[f"step {stored.step}"] = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return found


def _intervened(folder: Path) -> dict[str, Any]:
    from kvjax.artifacts.results import open_results

    return {f"{one.kind} {one.window}": _variables(one.dataset) for one in open_results(folder / RUN).interventions()}


def _studied(folder: Path) -> dict[str, Any]:
    """Collects the numbers of every run and comparison below a folder."""
    from kvjax.artifacts.results import open_results
    from kvjax.artifacts.tables import read_dataset

    found: dict[str, Any] = {}
    for sweep in sorted((folder / STUDY).rglob("analysis/sweep.json")):
        run, name = sweep.parents[1], str(sweep.parents[1].relative_to(folder))
        results, best = open_results(run), RunLayout(run).evaluation("best")
        found[name] = [_as_trained_at_once(row) for row in results.rows]
        found[f"{name} windows"] = results.windows.model_dump(mode="json")["windows"]
        found[f"{name} story"] = results.story.model_dump(mode="json")["accuracy"]
        if best.is_file():
            found[f"{name} evaluation"] = read_json(best)["splits"]
    for name in ("comparison.nc", "factor.nc"):
        for path in sorted((folder / STUDY).rglob(name)):
            found[str(path.relative_to(folder))] = _variables(read_dataset(path, expected="arrays"))
    return found


def _as_trained_at_once(row: dict[str, Any]) -> dict[str, Any]:
    """Leaves out that training was resumed, which a killed study records as it should."""
    return row | {"trajectory_breaks": [why for why in row["trajectory_breaks"] if "resumed" not in why]}


def _variables(dataset: Any) -> dict[str, np.ndarray]:
    return {str(name): variable.values for name, variable in dataset.variables.items()}


VICTIMS: dict[str, Victim] = {
    "train": Victim(None, _train, _trained),
    "convert": Victim("train", lambda folder: ["convert", f"--run_dirs={folder / RUN}"], _converted),
    "checkpoint-sweep": Victim(
        "train", lambda folder: ["checkpoint-sweep", f"--run_dirs={folder / RUN}", *_SWEEP], _swept
    ),
    "intervene": Victim(
        "checkpoint-sweep",
        lambda folder: [
            *("intervene", f"--run_dirs={folder / RUN}", "--steps=50-60", "--force", "--pairs_per_kind=2"),
            "--kinds=activation_patching,neurons",
        ],
        _intervened,
    ),
    "pipeline": Victim(
        None,
        lambda folder: [
            *("pipeline", f"--config={folder / 'study.json'}", f"--benchmark_config={folder / 'benchmark.json'}"),
            *("--seeds=3,4", "--pairs_per_kind=2", f"--output_dir={folder / STUDY}"),
        ],
        _studied,
    ),
    "factor-screen": Victim(
        None,
        lambda folder: ["factor-screen", f"--config={folder / 'screen.json'}", f"--output_dir={folder / STUDY}"],
        _studied,
    ),
}
