"""Plans interventions in a run: which windows, which kinds in each, and what was measured before."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvjax.artifacts.birth_windows_schema import read_birth_windows
from kvjax.artifacts.files import file_sha256, read_json
from kvjax.artifacts.identity import Identity
from kvjax.artifacts.results import Intervention, RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import InputError, bad_argument, unusable
from kvjax.execution.inputs import RunInputs
from kvjax.intervene.ablations import DEFAULT_ABLATION
from kvjax.intervene.kinds import find_kind
from kvjax.intervene.metrics import DEFAULT_METRIC
from kvjax.intervene.settings import InterventionSettings
from kvjax.model.components import Component, all_components
from kvjax.task.pairs import PairSet, own_pairs

# Raised whenever a number of an intervention or a name in its files changes, so that older ones are measured anew.
INTERVENTION_VERSION = 5


@dataclasses.dataclass(frozen=True)
class Window:
    """Some checkpoints of a run, and the name of the files about them."""

    name: str
    description: dict[str, Any]
    steps: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """One kind of intervention in one window.

    Attributes:
      window, kind: which.
      path: where its summary lies, or will.
      chosen: the settings that its numbers depend on.
      earlier: the earlier summary of exactly these settings and inputs. It counts as long as the window's checkpoint
        files have the hashes that it records. None if there is none.
      reads: of the kinds whose stored results it is shown beside.
    """

    window: Window
    kind: str
    path: Path
    chosen: Mapping[str, Any]
    earlier: dict[str, Any] | None
    reads: tuple[Task, ...] = ()

    def is_measured_on(self, hashes: Mapping[int, str]) -> bool:
        """Checks whether the earlier summary is of checkpoint files with these hashes, by step."""
        return self.earlier is not None and _recorded(self.earlier, "checkpoints") == _by_step(hashes)

    def has_read(self, stored: Mapping[str, Intervention]) -> bool:
        """Checks whether the earlier summary stands beside each of the stored results; it may have read others too."""
        read = (self.earlier and _recorded(self.earlier, "stored_results")) or {}
        return all(read.get(kind) == _arrays_sha256(result) for kind, result in stored.items())


@dataclasses.dataclass(frozen=True)
class InterventionPlan:
    """The kinds to measure in each window of one run, and the results that are there already.

    Attributes:
      inputs: the run with its benchmark and probe set.
      pair_set: the pairs.
      components: the named set, in forward order; None for none.
      tasks: window by window.
    """

    inputs: RunInputs
    pair_set: PairSet
    components: tuple[Component, ...] | None
    tasks: tuple[Task, ...]

    def by_window(self) -> Iterator[tuple[Window, list[Task]]]:
        """Yields each window with its tasks."""
        for window, tasks in itertools.groupby(self.tasks, key=lambda task: task.window):
            yield window, list(tasks)

    def measured_on(
        self, task: Task, hashes: Mapping[int, str], stored: Mapping[str, Intervention] | None = None
    ) -> Identity:
        """Forms what a task's numbers depend on.

        Args:
          task: one of `tasks`, or of what they read.
          hashes: of its window's checkpoint files, by step.
          stored: the results that it reads.
        """
        read = {kind: _arrays_sha256(result) for kind, result in (stored or {}).items()}
        return Identity(task.chosen, _measured_inputs(self.inputs, self.pair_set, task, _by_step(hashes), read))

    def stored_results(self, task: Task, hashes: Mapping[int, str]) -> dict[str, Intervention]:
        """Opens the results that a task reads, by kind; those of other settings, pairs or files are left out."""
        found = {}
        for other in task.reads:
            result = Intervention.open_whole(other.path)
            if result is not None and result.document["measured_on"] == self.measured_on(other, hashes).document:
                found[other.kind] = result
        return found

    def to_measure(self) -> list[Task]:
        """Lists the tasks that lack a summary of the checkpoint files as they are.

        Raises:
          InputError: a checkpoint file cannot be read.
        """
        missing = []
        for window, tasks in self.by_window():
            if all(task.earlier is None for task in tasks):
                missing += tasks
            else:
                hashes = window_hashes(self.inputs.run, window)
                missing += [task for task in tasks if not self._is_current(task, hashes)]
        return missing

    def _is_current(self, task: Task, hashes: Mapping[int, str]) -> bool:
        return task.is_measured_on(hashes) and task.has_read(self.stored_results(task, hashes))


def plan_interventions(
    inputs: RunInputs, windows: Sequence[Window], settings: InterventionSettings
) -> InterventionPlan:
    """Says which kinds are to be measured in which windows of a run, so that a refusal comes before any measurement.

    No checkpoint file is read yet. Whether one has changed since a summary was written is known once it is loaded or
    hashed.

    Raises:
      InputError: a name is unknown, or something was measured before with other settings.
    """
    named = _named_components(inputs.run, settings)
    pair_set = own_pairs(inputs.probe, inputs.benchmark)

    choices = {
        "components": None if named is None else list(map(str, named)),
        # Null for the default, which results that do not say it are of.
        "metric": None if settings.metric == DEFAULT_METRIC else settings.metric,
        "rank_by": None if settings.rank_by == DEFAULT_ABLATION else settings.rank_by,
    }

    def task(window: Window, name: str) -> Task:
        kind = find_kind(name)
        chosen = {
            "pairs_per_kind": settings.pairs_per_kind,
            "precision": settings.precision,
            "probe_set": inputs.probe.manifest.content_sha256[:12],
            **{setting: choices[setting] for setting in kind.settings},
        }
        reads = tuple(task(window, other) for other in kind.reads)
        return Task(window, name, inputs.run.layout.intervention(name, window.name), chosen, None, reads)

    def with_earlier(planned: Task) -> Task:
        earlier = _read_summary(planned.path)
        if earlier is not None:
            recorded = _recorded(earlier, "checkpoints"), _recorded(earlier, "stored_results")
            wanted = Identity(planned.chosen, _measured_inputs(inputs, pair_set, planned, *recorded))
            decision = wanted.decide(earlier.get("measured_on", {}), planned.path, overwrite=settings.overwrite)
            if decision == "redo" or Intervention.open_whole(planned.path) is None:
                earlier = None
        return dataclasses.replace(planned, earlier=earlier)

    tasks = tuple(with_earlier(task(window, kind)) for window in windows for kind in settings.kinds)
    return InterventionPlan(inputs, pair_set, named, tasks)


def window_hashes(run: RunDir, window: Window) -> dict[int, str]:
    """Hashes the checkpoint files of a window, by step.

    Raises:
      InputError: a file cannot be read.
    """
    return {step: file_sha256(run.checkpoints[step]) for step in window.steps}


def _measured_inputs(inputs: RunInputs, pair_set: PairSet, task: Task, hashes: Any, read: Any) -> dict[str, Any]:
    """Collects what a task's numbers depend on beside the settings.

    Args:
      inputs, pair_set: the run and the pairs.
      task: which.
      hashes, read: of the checkpoint files and of the results that it reads, as a summary records them.
    """
    found = {
        "intervention_version": INTERVENTION_VERSION,
        "window": task.window.description,
        "checkpoints": hashes,
        "pairs_sha256": pair_set.manifest.content_sha256,
        "probe_set_sha256": inputs.probe.manifest.content_sha256,
        "fit_sha256": inputs.probe.manifest.fit_sha256,
    }
    return found | ({"stored_results": read} if task.reads else {})


def _by_step(hashes: Mapping[int, str]) -> dict[str, str]:
    return {str(step): sha256 for step, sha256 in hashes.items()}


def _recorded(summary: Mapping[str, Any], name: str) -> Any:
    """Reads one of the inputs that a summary was measured on; None if it has none of that name."""
    document: Any = summary
    for part in ("measured_on", "inputs", name):
        document = document.get(part) if isinstance(document, dict) else None
    return document


def _arrays_sha256(result: Intervention) -> str:
    """Reads the recorded hash of a result's arrays: its summary may be another, by another metric."""
    return result.document["arrays"]["sha256"]


def _read_summary(path: Path) -> dict[str, Any] | None:
    """Reads a summary; gives None if it is missing or damaged."""
    try:
        document = read_json(path)
    except InputError:
        return None
    return document if isinstance(document, dict) else None


def chosen_windows(run: RunDir, settings: InterventionSettings) -> list[Window]:
    """Finds the windows, or the named steps, to intervene in.

    Raises:
      InputError: there is no such window or step.
    """
    if settings.steps is not None:
        steps = tuple(run.select_steps(settings.steps))
        return [Window(_steps_name(run, steps), {"steps": list(steps)}, steps)]
    path = run.layout.birth_windows
    if not path.is_file():
        raise unusable(path, "birth windows (run kvjax birth-windows, or name `steps`)", "no such file")
    found = read_birth_windows(path) if settings.force else RunResults(run).windows
    windows = []
    for entry in found.windows:
        if settings.window in ("all", str(entry.center_step)):
            bounds = {"start_step": entry.start_step, "center_step": entry.center_step, "end_step": entry.end_step}
            missing = [step for step in entry.steps if step not in run.checkpoints]
            if missing:
                raise unusable(run.layout.checkpoints, f"the window's checkpoint {missing[0]}", run.describe_steps())
            windows.append(Window(f"window_{entry.center_step}", bounds | {"steps": entry.steps}, tuple(entry.steps)))
    if not windows:
        centers = ", ".join(str(entry.center_step) for entry in found.windows) or f"none ({found.verdict})"
        expected = "a window (or `steps`)" if settings.window == "all" else f"a window around {settings.window}"
        raise unusable(path, expected, f"windows around: {centers}")
    return windows


def _named_components(run: RunDir, settings: InterventionSettings) -> tuple[Component, ...] | None:
    """Reads the named set, in forward order and each once; raises `InputError` if the model lacks one of them."""
    if settings.components is None:
        return None
    components = all_components(run.config.model.n_layers, run.config.model.n_heads)
    named = [Component.parse(spelling, "components") for spelling in settings.components]
    for component in named:
        if component not in components:
            raise bad_argument("components", f"components among {', '.join(map(str, components))}", component)
    return tuple(component for component in components if component in named)


def _steps_name(run: RunDir, steps: tuple[int, ...]) -> str:
    """Names the files about some steps: by the ends of a whole stretch of the run, or by every step."""
    stretch = tuple(step for step in run.checkpoints if steps[0] <= step <= steps[-1])
    if len(steps) == 1 or stretch == steps:
        return "_".join(["steps", *dict.fromkeys(map(str, (steps[0], steps[-1])))])
    every = "-".join(map(str, steps))
    return f"steps_{every if len(every) < 60 else hashlib.sha256(every.encode()).hexdigest()[:12]}"
