"""Makes parts of a run's results once more, in a folder of their own, and says how far the numbers are apart.

Nothing of the run is written. Its probe set and, where asked for, what was measured before are found in that folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.artifacts.differences import Difference, between_arrays, between_documents, largest
from kvjax.artifacts.files import HashedFile
from kvjax.artifacts.find_runs import with_results_in
from kvjax.artifacts.layout import ProbeSetLayout, step_name, step_named
from kvjax.artifacts.partials import partial_folder
from kvjax.artifacts.results import Intervention, RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.sweep_schema import Sweep
from kvjax.converters.cached_loader import CachedLoader, store_identity
from kvjax.converters.parameter_store import ParameterStore, tree_sha256
from kvjax.errors import Note, unusable
from kvjax.execution.inputs import BEST, RunInputs, prepare_run
from kvjax.intervene.analysis import intervene_in_run
from kvjax.intervene.metrics import DEFAULT_METRIC
from kvjax.intervene.plan import Window, plan_interventions
from kvjax.intervene.settings import InterventionSettings
from kvjax.sweeps.run import sweep_runs
from kvjax.sweeps.settings import SweepSettings

_SMALL = 1e-3  # of recoveries and effects, which are of the order of 1
_MADE_ANEW = ("versions", "device", "measured_on", "arrays", "content_sha256")  # of a summary: beside its numbers


def redraw_tables(run: RunDir, sweep: Sweep, benchmark_dir: str | None) -> Difference:
    """Draws a sweep's tables again from the measured sums, and compares every number.

    Raises:
      InputError: an input cannot be used.
    """
    with _copy_of(run, sweep, measured=True) as copied:
        inputs = _inputs_of(copied, sweep, benchmark_dir, "all")
        loader = CachedLoader(run, inputs.benchmark, certify_on=inputs.certificate_tokens, keep="nothing")
        sweep_runs([inputs], lambda _: loader, settings=_settings_of(run, sweep), advance=lambda count: None)
        before, now = RunResults(run), RunResults(copied)
        layout = run.layout
        tables = [
            (layout.rows, before.rows, now.rows),
            (layout.heads, before.heads, now.heads),
            (layout.mlps, before.mlps, now.mlps),
        ]
        found = [between_documents(mine, theirs, where=path.name) for path, mine, theirs in tables]
        for group in ("metrics", "intervals", "events"):
            mine, theirs = getattr(before, group), getattr(now, group)
            found.append(between_arrays(_variables(mine), _variables(theirs), where=f"{layout.arrays.name}/{group}"))
        return largest(found)


def remeasure_checkpoints(
    run: RunDir, sweep: Sweep, benchmark_dir: str | None, steps: Sequence[int], *, neighbours: bool
) -> dict[int, Difference]:
    """Converts and certifies checkpoints again, measures them again, and compares every sum: step -> difference.

    Args:
      run, sweep, benchmark_dir: the run, what was measured on it, and its benchmark if it is not where it was.
      steps: the checkpoints.
      neighbours: whether the two checkpoints before each are measured too, and what is of several is compared as well.

    Raises:
      InputError: an input cannot be used, or a conversion does not certify.
    """
    swept = [checkpoint.step for checkpoint in sweep.checkpoints]
    places = {place - back for place in map(swept.index, steps) for back in range(3 if neighbours else 1)}
    wanted = [swept[place] for place in sorted(places) if place >= 0]
    with _copy_of(run, sweep, measured=False) as copied:
        inputs = _inputs_of(copied, sweep, benchmark_dir, wanted)
        certify_on = inputs.certificate_tokens
        loader = CachedLoader(run, inputs.benchmark, certify_on=certify_on, trust_store=False, keep="nothing")
        settings = _settings_of(run, sweep)
        sweep_runs([inputs], lambda _: loader, settings=settings, advance=lambda count: None)
        found = {}
        for step in steps:
            pattern = f"*{step_name(step)}*.npz" if neighbours else f"{step_name(step)}.npz"
            files = sorted(copied.layout.measured.glob(pattern))
            differences = [
                between_arrays(_sums(run.layout.measured / file.name), _sums(file), where=file.name) for file in files
            ]
            found[step] = largest(differences)
        return found


def parameters_as_stored(run: RunDir, inputs: RunInputs, step: int) -> bool | None:
    """Checks whether the store holds what a checkpoint file converts to; None if it does not hold the file.

    Raises:
      InputError: the file cannot be used, or its conversion does not certify.
    """
    path, benchmark = run.checkpoints[step], inputs.benchmark
    stored = ParameterStore(run.layout.converted, store_identity(run, benchmark)).find(
        HashedFile.read(path, "a checkpoint")
    )
    loader = CachedLoader(run, benchmark, certify_on=inputs.certificate_tokens, trust_store=False, keep="nothing")
    converted = loader.load(path, step)
    return None if stored is None else tree_sha256(stored.params) == tree_sha256(converted.params)


def remeasure_intervention(run: RunDir, found: Intervention, benchmark_dir: str | None) -> Difference:
    """Measures an intervention again, and compares every number of its arrays and its summary.

    Raises:
      InputError: an input cannot be used.
    """
    document, chosen = found.document, found.document["measured_on"]["settings"]
    settings = InterventionSettings(
        kinds=(found.kind,),
        force=True,
        metric=document.get("metric") or DEFAULT_METRIC,
        **{
            name: chosen[name]
            for name in ("pairs_per_kind", "components", "rank_by", "precision")
            if chosen.get(name) is not None
        },
    )
    window = Window(found.window, document["window"], tuple(document["steps"]))
    with _copy_of(run, None, measured=False) as copied:
        for file in run.layout.interventions.glob("*/*"):
            if file.parent.name != found.kind:  # some kinds are shown beside others
                _link(file, copied.layout.interventions / file.parent.name / file.name)
        last = str(max(copied.checkpoints))
        inputs = prepare_run(copied, benchmark_dir=benchmark_dir, probe_set=None, steps="all", reference=last)
        plan = plan_interventions(inputs, [window], settings)
        loader = CachedLoader(run, inputs.benchmark, certify_on=inputs.certificate_tokens, keep="nothing")
        (report,) = intervene_in_run(plan, loader, settings, advance=lambda count: None)
        again = Intervention.open(report.path)
        if again.document["measured_on"] != document["measured_on"]:
            raise unusable(found.path, "the pairs, settings and results that it was measured on", "others")
        name = f"{found.kind}/{found.path.name}"
        arrays = between_arrays(_variables(found.dataset), _variables(again.dataset), where=f"{name} (arrays)")
        numbers = between_documents(_numbers(document), _numbers(again.document), where=name, floor=_SMALL)
        return largest([arrays, numbers])


def inputs_of(run: RunDir, sweep: Sweep, benchmark_dir: str | None) -> RunInputs:
    """Opens what a sweep measured, without writing anything into the run.

    Raises:
      InputError: an input cannot be used.
    """
    with _copy_of(run, sweep, measured=False) as copied:
        return _inputs_of(copied, sweep, benchmark_dir, "all")


def _inputs_of(copied: RunDir, sweep: Sweep, benchmark_dir: str | None, steps: str | Sequence[int]) -> RunInputs:
    named = sweep.reference
    reference = "final" if named is None else BEST if named == BEST else str(step_named(named))
    return prepare_run(
        copied,
        benchmark_dir=benchmark_dir,
        probe_set=None,
        steps=steps,
        reference=reference,
        still_training=named is None,
    )


def _settings_of(run: RunDir, sweep: Sweep) -> SweepSettings:
    """Collects the settings that a sweep's tables were made with."""
    identity = sweep.identity
    return SweepSettings(
        ablations=tuple(identity["ablations"]),
        resample_draws=identity["resample_draws"],
        probe=identity["probe"],
        precision=sweep.precision,
        rank_by=sweep.ranked_by,
        event_drift="residual_cka" in RunResults(run).metrics,
        contradiction="note",
        skip_bad=bool(sweep.refused),
    )


@contextlib.contextmanager
def _copy_of(run: RunDir, sweep: Sweep | None, *, measured: bool) -> Iterator[RunDir]:
    """Yields a run whose results lie in a temporary folder.

    Args:
      run: the run.
      sweep: whose checkpoints it has; all of the run's if None.
      measured: whether what was measured on them is there.
    """
    with partial_folder(Path(tempfile.gettempdir()) / "kvjax_verify") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        folder.chmod(0o700)
        (copied,) = with_results_in([run], folder)
        theirs, ours = ProbeSetLayout(run.layout.probe_set), ProbeSetLayout(copied.layout.probe_set)
        for name in ("records", "manifest", "companion", "fit", "sources", "pairs", "pairs_manifest"):
            if (file := getattr(theirs, name)).is_file():
                getattr(ours, name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, getattr(ours, name))
        if measured:
            for file in run.layout.measured.glob("*.npz"):
                _link(file, copied.layout.measured / file.name)
        if sweep is not None:
            swept = {one.step: run.checkpoints[one.step] for one in sweep.checkpoints if one.step in run.checkpoints}
            copied = dataclasses.replace(copied, checkpoints=swept)
        yield copied


def _link(file: Path, name: Path) -> None:
    name.parent.mkdir(parents=True, exist_ok=True)
    name.symlink_to(file.resolve())


def _sums(path: Path) -> dict[str, np.ndarray]:
    """Reads measured sums; none if the file is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files if name != "info"}
    except Exception:  # NumPy and zipfile raise many kinds
        return {}


def _variables(dataset: Any) -> dict[str, np.ndarray]:
    return {str(name): variable.values for name, variable in dataset.variables.items()}


def _numbers(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in summary.items() if name not in _MADE_ANEW}
