"""Whether the results of runs are what their inputs give, as far as that can be found out; nothing is written.

Hashes find files that changed. They do not find a number that was edited together with its hash: for that, tables are
drawn again from the measured sums, and a random sample of checkpoints and interventions is measured again.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvjax.artifacts.checkpoint_sums import ResultStore
from kvjax.artifacts.files import file_sha256, read_json
from kvjax.artifacts.find_comparisons import find_comparison_dirs
from kvjax.artifacts.find_runs import find_run_dirs
from kvjax.artifacts.identity import check_seal
from kvjax.artifacts.layout import step_name
from kvjax.artifacts.results import Intervention, RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.sweep_schema import Sweep
from kvjax.errors import InputError, unusable
from kvjax.execution.inputs import RunInputs
from kvjax.intervene.plan import INTERVENTION_VERSION
from kvjax.pipeline.checks import MEASURED, REDRAWN, SEALED, UNSEALED, Check, Verified, compared, listed, made_again
from kvjax.pipeline.progress import Progress, no_progress
from kvjax.pipeline.remeasure import (
    inputs_of,
    parameters_as_stored,
    redraw_tables,
    remeasure_checkpoints,
    remeasure_intervention,
)
from kvjax.pipeline.settings import RunsOnBenchmark, VerifySettings
from kvjax.pipeline.verify_comparisons import verify_comparison, verify_factor
from kvjax.pipeline.verify_training import check_config, check_evaluation, check_log, evaluate_again, evaluation_files
from kvjax.sweeps.run import RESULT_VERSION
from kvjax.task.benchmark import Benchmark
from kvjax.task.probe_set import frozen_manifest


def verify(runs: RunsOnBenchmark, settings: VerifySettings, progress: Progress = no_progress) -> list[Verified]:
    """Compares the inputs and results of runs with what was recorded, and a sample with what is measured now.

    Raises:
      InputError: a run cannot be opened, or has no sweep.
    """
    found = find_run_dirs(runs.run_dirs)
    for run in found:
        if not run.layout.sweep.is_file():
            raise unusable(run.layout.sweep, "a sweep to verify (run kvjax checkpoint-sweep first)", "no such file")
    verified = []
    with progress(len(found), "runs") as advance:
        for run in found:
            title = f"{run.config.title}, {run.path}"
            verified.append(Verified(title, list(_checks(run, runs.benchmark_dir, settings))))
            advance(1)
    return verified


def verify_comparisons(settings: VerifySettings) -> list[Verified]:
    """Compares the comparisons and factors that are named with what they record, and with their runs as they are.

    Raises:
      InputError: a folder has none.
    """
    compared_runs = find_comparison_dirs(settings.comparison_dirs or (), parameter="comparison_dirs")
    factors = find_comparison_dirs(settings.factor_dirs or (), parameter="factor_dirs", stem="factor")
    again = settings.sample > 0
    return [*(verify_comparison(path, again=again) for path in compared_runs), *map(verify_factor, factors)]


def _checks(run: RunDir, benchmark_dir: str | None, settings: VerifySettings) -> Iterator[Check]:
    results = RunResults(run)
    try:
        sweep = results.sweep
    except InputError as error:
        yield Check(run.layout.sweep.name, "differs", str(error))
        return
    seal = SEALED if sweep.content_sha256 else UNSEALED
    yield Check(run.layout.sweep.name, "holds" if sweep.content_sha256 else "open", seal)
    checks = _Checks(results, sweep, benchmark_dir)
    yield from checks.inputs()
    yield from checks.results()
    if (reason := checks.why_not_again(settings.sample)) is not None:
        yield Check("numbers", "open", f"nothing was measured again: {reason}")
        return
    chance = random.Random(f"{settings.seed}/{run.config.run_name}")
    yield checks.redrawn()
    steps = _sample(chance, checks.steps, settings.sample)
    yield from checks.checkpoints_again(steps)
    yield from check_log(run, checks.benchmark, steps)
    for found in _sample(chance, checks.interventions, settings.sample):
        yield checks.intervention_again(found)
    for path in _sample(chance, checks.evaluations, settings.sample):
        yield evaluate_again(run, checks.benchmark, path)


class _Checks:
    """The comparisons of one run, in the order of what they rest on.

    Attributes:
      steps: those whose files and sums are there, as recorded.
      interventions: those whose files have the hashes they record.
      evaluations: files of evaluations of checkpoints as they are.
    """

    def __init__(self, results: RunResults, sweep: Sweep, benchmark_dir: str | None):
        self._results, self._run, self._sweep, self._benchmark_dir = results, results.run, sweep, benchmark_dir
        self._opened: RunInputs | None = None
        self._why_not_opened = ""
        self._whole = True  # whether the tables are as recorded
        self.steps: list[int] = []
        self.interventions: list[Intervention] = []
        self.evaluations: list[Path] = []

    @property
    def benchmark(self) -> Benchmark:
        """The benchmark, if `why_not_again` gives no reason."""
        return self._opened.benchmark

    def inputs(self) -> Iterator[Check]:
        """Compares checkpoints, benchmark and probe set with the hashes that the sweep recorded."""
        recorded = {checkpoint.step: checkpoint.sha256 for checkpoint in self._sweep.checkpoints}
        hashes = self._results.checkpoint_hashes()
        self.steps = [step for step, sha256 in hashes.items() if sha256 == recorded[step]]
        changed, gone = [step for step in hashes if step not in self.steps], sorted(recorded.keys() - hashes.keys())
        if self.steps:
            yield Check("checkpoints", "holds", f"{len(self.steps)} files have the hashes they were measured by")
        if changed:
            yield Check("checkpoints", "differs", f"steps {listed(changed)} are other files than were measured")
        if gone:
            yield Check("checkpoints", "open", f"steps {listed(gone)} have no file any more")
        yield check_config(self._run, self.steps)
        try:
            benchmark = Benchmark.open(self._run.benchmark_dir(self._benchmark_dir))
        except InputError as error:
            yield Check("benchmark", "open", str(error))
            self._why_not_opened = "there is no benchmark"
        else:
            yield self._benchmark(benchmark)
        yield self._probe_set()

    def results(self) -> Iterator[Check]:
        """Compares every file of results with the hash that another file, or itself, records."""
        layout = self._run.layout
        tables = compared("tables", self._results.check_tables, "all four have the hashes in sweep.json")
        self._whole = tables.verdict == "holds"
        yield tables
        for path, name in ((layout.birth_windows, "windows"), (layout.story, "story")):
            if path.is_file():
                yield compared(path.name, lambda name=name: getattr(self._results, name), "as written, of this sweep")
        if (path := layout.importance).is_file():
            yield compared(path.name, lambda: check_seal(read_json(path), path, "run kvjax intervene again"), SEALED)
        for path in self._results.intervention_files():
            yield compared(
                _name(path), lambda path=path: self._check_intervention(path), "summary and arrays as written"
            )
        for path in evaluation_files(self._run):
            found = check_evaluation(self._run, path)
            self.evaluations += [path] if found.reason in (SEALED, UNSEALED) else []
            yield found
        store = ResultStore(layout.measured, self._sweep.identity)
        sha256s = {checkpoint.step: checkpoint.sha256 for checkpoint in self._sweep.checkpoints}
        lost = [step for step in self.steps if not store.holds(step_name(step), sha256s[step])]
        self.steps = [step for step in self.steps if step not in lost]
        if lost:
            yield Check("measured sums", "open", f"those of steps {listed(lost)} are missing")

    def why_not_again(self, sample: int) -> str | None:
        """Says why nothing can be made again to compare with; None if it can."""
        if sample == 0:
            return "the sample is 0"
        if not self._whole:
            return "the tables are not those that were written"
        if (version := self._sweep.identity.get("result_version")) != RESULT_VERSION:
            return f"it was measured by version {version} of the measures; this is {RESULT_VERSION}"
        if self._opened is None:
            return self._why_not_opened
        return None if self.steps else "no checkpoint is as it was measured"

    def redrawn(self) -> Check:
        """Draws the tables again."""
        subject = "tables, drawn again"
        if not self._complete:
            return Check(subject, "open", "not every checkpoint and its sums are as they were measured")
        return made_again(subject, lambda: redraw_tables(self._run, self._sweep, self._benchmark_dir), REDRAWN)

    def checkpoints_again(self, steps: Sequence[int]) -> Iterator[Check]:
        """Converts, certifies and measures some checkpoints again."""
        for step in steps:
            yield self._certified(step)
        again = functools.cache(
            lambda: remeasure_checkpoints(self._run, self._sweep, self._benchmark_dir, steps, neighbours=self._complete)
        )
        devices = {one.step: (one.model_extra or {}).get("device") for one in self._sweep.checkpoints}
        for step in steps:
            yield made_again(
                f"step {step}, measured again", lambda step=step: again()[step], MEASURED, device=devices[step]
            )

    def intervention_again(self, found: Intervention) -> Check:
        """Measures an intervention again."""
        subject = f"{_name(found.path)}, measured again"
        inputs = found.document["measured_on"]["inputs"]
        if (version := inputs.get("intervention_version")) != INTERVENTION_VERSION:
            reason = f"measured by version {version} of interventions; this is {INTERVENTION_VERSION}"
            return Check(subject, "open", reason)
        if not set(found.document["steps"]) <= set(self.steps):
            return Check(subject, "open", "not every checkpoint is as it was measured")
        return made_again(
            subject,
            lambda: remeasure_intervention(self._run, found, self._benchmark_dir),
            MEASURED,
            device=found.document.get("device"),
        )

    @property
    def _complete(self) -> bool:
        return len(self.steps) == len(self._sweep.checkpoints)

    def _certified(self, step: int) -> Check:
        subject = f"step {step}, converted again"
        try:
            same = parameters_as_stored(self._run, self._opened, step)
        except InputError as error:
            return Check(subject, "differs", str(error))
        if same is None:
            return Check(subject, "holds", "logits agree with PyTorch's; the parameters are not stored")
        if same:
            return Check(subject, "holds", "logits agree with PyTorch's, and the stored parameters are these")
        return Check(subject, "differs", "the stored parameters are not those that the file converts to")

    def _benchmark(self, benchmark: Benchmark) -> Check:
        splits = read_json(benchmark.layout.metadata)["splits"]
        files = {split: benchmark.layout.split(split) for split in splits}
        changed = [
            split
            for split, file in files.items()
            if "sha256" in splits[split] and file.is_file() and file_sha256(file) != splits[split]["sha256"]
        ]
        missing = [split for split, file in files.items() if not file.is_file()]
        if changed or not benchmark.hashes.names(self._sweep.benchmark.sha256):
            reason = (
                f"split {changed[0]} is another file" if changed else "it is another one than the sweep was made on"
            )
            return Check("benchmark", "differs", f"{benchmark.path}: {reason}")
        if missing:
            return Check("benchmark", "open", f"{benchmark.path} lacks the split {missing[0]}")
        return Check("benchmark", "holds", f"{benchmark.path}: metadata and {len(files)} splits as recorded")

    def _probe_set(self) -> Check:
        path, recorded = self._run.layout.probe_set, self._sweep.probe_set.content_sha256
        try:
            content = frozen_manifest(path).content_sha256 if path.is_file() else None
            if not self._why_not_opened:
                self._opened = inputs_of(self._run, self._sweep, self._benchmark_dir)
        except InputError as error:
            self._why_not_opened = "the probe set cannot be used"
            return Check("probe set", "differs", str(error))
        if content is None or content != recorded:
            self._opened, self._why_not_opened = None, "there is not the probe set that was measured on"
            verdict = "open" if content is None else "differs"
            return Check("probe set", verdict, f"expected {recorded[:12]}; found {content and content[:12]}")
        return Check("probe set", "holds", f"{recorded[:12]}, every file as frozen")

    def _check_intervention(self, path: Path) -> None:
        found = Intervention.open(path)
        found.check_arrays()
        self.interventions.append(found)


def _sample(chance: random.Random, members: Sequence, size: int) -> list:
    """Chooses some members at random, in their order."""
    chosen = sorted(chance.sample(range(len(members)), min(size, len(members))))
    return [members[place] for place in chosen]


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
